"""All steps of a HyperLSTM, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hyperfast import checks
from hyperfast.nets.hyper_lstm_backward import backward
from hyperfast.nets.hyper_lstm_steps import State, Step, Weights, step


def unroll(x: Tensor, keep: Tensor | None, start: State, sizes: Sequence[int], w: Weights) -> State:
    """The states of all steps, ``(R, .)``, one step's after another's, as in a PackedSequence.

    Args:
        x, keep: ``(R, .)``, what :func:`step` takes.
        start: of ``sizes[0]`` sequences.
        sizes: how many sequences have every step, never more than had the step before.
    """
    given = x, keep, *start, *w.tensors()
    with _no_autocast(x):
        if (
            torch.is_grad_enabled()
            and any(t is not None and t.requires_grad for t in given)
            and not torch.compiler.is_compiling()
            and not checks.is_transformed()
        ):
            return State(*Unrolled.apply(sizes, *given))
        return run(x, keep, start, sizes, w)


def _no_autocast(x: Tensor) -> Any:
    """All has been cast: on some devices autocast would take single ops back to float32."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if checks.autocast_dtype(kind) else nullcontext()


def last(states: State, sizes: Sequence[int]) -> State:
    """Of every sequence, the state of its last step: ``(sizes[0], .)``."""
    steps = zip(accumulate(sizes), sizes, [*sizes[1:], 0], strict=True)
    # Rows of a step that the next one has not. The first sequences are the longest.
    ends = [slice(end - b + later, end) for end, b, later in steps][::-1]
    return State(*(torch.cat([t[rows] for rows in ends]) for t in states))


def run(
    x: Tensor,
    keep: Tensor | None,
    state: State,
    sizes: Sequence[int],
    w: Weights,
    steps: list[Step] | None = None,
) -> State:
    """:func:`unroll` in plain PyTorch; what is made on the way goes into ``steps``."""
    states = []
    masks = [None] * len(sizes) if keep is None else keep.split(sizes)
    for b, rows, mask in zip(sizes, x.split(sizes), masks, strict=True):
        state, made = step(rows, mask, state.first(b), w)
        states.append(state)
        if steps is not None:
            steps.append(made)
    return State(*map(torch.cat, zip(*states, strict=True)))


class Unrolled(torch.autograd.Function):
    """:func:`run`, with :func:`backward`, whose own derivative is autograd's of :func:`run`."""

    @staticmethod
    def forward(ctx: Any, sizes: Sequence[int], *given: Any) -> State:
        steps: list[Step] = []
        x, keep, *rest = given
        states = run(x, keep, State(*rest[:4]), sizes, Weights.of(rest[4:]), steps)
        ctx.sizes, ctx.given = sizes, len(given)
        made = (t for each in steps for t in each.tensors())
        ctx.save_for_backward(*given, states.h, states.hyper_h, *made)
        ctx.set_materialize_grads(False)
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        given, (h, hyper_h, *made) = saved[: ctx.given], saved[ctx.given :]
        with _no_autocast(h):
            batched = any(torch._C._functorch.is_legacy_batchedtensor(g) for g in _some(grads))
            if torch.is_grad_enabled() or checks.is_transformed() or batched:
                return None, *_differentiable(ctx.sizes, given, grads)
            x, keep, *rest = given
            each = len(made) // len(ctx.sizes)
            steps = [Step.of(made[at : at + each]) for at in range(0, len(made), each)]
            start, w = State(*rest[:4]), Weights.of(rest[4:])
            return None, *backward(x, keep, start, ctx.sizes, w, h, hyper_h, steps, grads)


def _some(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _differentiable(
    sizes: Sequence[int], given: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of what was given, by autograd, which records how they came about where the
    caller asks for it, and whose rules know every transform."""
    if not _some(grads):
        return [None] * len(given)
    recorded = torch.is_grad_enabled()
    # Views: what was given may depend on each other, and each gets its own share alone.
    with torch.enable_grad():
        own = [None if t is None else t.view_as(t) for t in given]
        x, keep, *rest = own
        states = run(x, keep, State(*rest[:4]), sizes, Weights.of(rest[4:]))  # type: ignore[arg-type]
    pairs = [(s, g) for s, g in zip(states, grads, strict=True) if g is not None]
    wanted = [t for t in own if t is not None and t.requires_grad]
    outputs, weights = zip(*pairs, strict=True)
    found = iter(
        torch.autograd.grad(outputs, wanted, weights, create_graph=recorded, allow_unused=True)
    )
    return [next(found) if t is not None and t.requires_grad else None for t in own]
