"""All steps of a HyperLSTM, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hyperfast import checks
from hyperfast.nets import hyper_lstm_cpu
from hyperfast.nets.hyper_lstm_backward import backward
from hyperfast.nets.hyper_lstm_steps import State, Weights, of_input, step
from hyperfast.ops.recorded import gradients, wanted_by_autograd


def unroll(
    x: Tensor, keep: Tensor | None, start: State, sizes: Sequence[int], w: Weights
) -> tuple[Tensor, State]:
    """``h (R, H)`` of all steps, one step's after another's, as in a PackedSequence, and the state
    of every sequence after its last step, ``(sizes[0], .)``.

    Args:
        x: ``(R, I)``.
        keep: ``(R, H)``, what :func:`step` takes.
        start: of ``sizes[0]`` sequences.
        sizes: how many sequences have every step, never more than had the step before.
    """
    given = x, keep, *start, *w.tensors()
    with _no_autocast(x):
        graph = torch.compiler.is_compiling() or torch._C._get_tracing_state()
        if graph or checks.is_transformed():
            return run(x, keep, start, sizes, w)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
            h, *ends = Unrolled.apply(sizes, *given)
            return h, State(*ends)
        if hyper_lstm_cpu.takes(given):
            h, ends, _ = hyper_lstm_cpu.run(x, keep, start, sizes, w, keep_all=False)
            return h, ends
        return run(x, keep, start, sizes, w)


def _no_autocast(x: Tensor) -> Any:
    """All has been cast: on some devices autocast would take single ops back to float32."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if checks.autocast_dtype(kind) else nullcontext()


def run(
    x: Tensor,
    keep: Tensor | None,
    state: State,
    sizes: Sequence[int],
    w: Weights,
    kept: list[Tensor | None] | None = None,
) -> tuple[Tensor, State]:
    """:func:`unroll` in plain PyTorch; what :func:`backward` needs goes into ``kept``."""
    of_x = of_input(x, w)
    if kept is not None:
        kept.append(of_x)
    masks = iter([None] * len(sizes) if keep is None else keep.split(sizes))

    def one(rows: Tensor, state: State) -> State:
        state, made = step(rows, next(masks), state, w)
        if kept is not None:
            kept.extend(made.tensors())
        return state

    return each_step(one, of_x, state, sizes)


def each_step(
    one: Callable[[Tensor, Any], Sequence[Tensor]], x: Tensor, state: Any, sizes: Sequence[int]
) -> tuple[Tensor, State]:
    """What :func:`unroll` returns, by a function of a step's rows and of the state before, which
    may be ``None`` at first, that returns the state after."""
    outputs, ends = [], []
    for b, rows, later in zip(sizes, x.split(sizes), [*sizes[1:], None], strict=True):
        state = State(*one(rows, state and state.first(b)))
        outputs.append(state.h)
        if later != b:  # the first sequences are the longest
            ends.append([t[later:] for t in state])
    return torch.cat(outputs), State(*map(torch.cat, zip(*ends[::-1], strict=True)))


class Unrolled(torch.autograd.Function):
    """The C++ kernels or :func:`run`, with a derivative by hand, whose own derivative is autograd's
    of :func:`run`."""

    @staticmethod
    def forward(ctx: Any, sizes: Sequence[int], *given: Any) -> tuple[Tensor, ...]:
        x, keep, *rest = given
        unrolled = x, keep, State(*rest[:4]), sizes, Weights.of(rest[4:])
        ctx.kernels = hyper_lstm_cpu.takes(given)
        kept: list[Any] = []
        if ctx.kernels:
            h, ends, kept = hyper_lstm_cpu.run(*unrolled, keep_all=True)
        else:
            h, ends = run(*unrolled, kept)
        ctx.sizes, ctx.given = sizes, len(given)
        ctx.save_for_backward(*given, h, *kept)
        ctx.set_materialize_grads(False)
        return h, *ends

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        given, (h, *kept) = saved[: ctx.given], saved[ctx.given :]
        with _no_autocast(h):
            if wanted_by_autograd(grads):
                return None, *gradients(partial(_outputs, ctx.sizes), given, grads)
            x, keep, *rest = given
            unrolled = x, keep, State(*rest[:4]), ctx.sizes, Weights.of(rest[4:])
            by = hyper_lstm_cpu.backward if ctx.kernels else backward
            return None, *by(*unrolled, h, kept, grads, ctx.needs_input_grad[1:])


def _outputs(sizes: Sequence[int], *given: Any) -> tuple[Tensor, ...]:
    x, keep, *rest = given
    h, ends = run(x, keep, State(*rest[:4]), sizes, Weights.of(rest[4:]))
    return h, *ends
