"""All steps of a HyperLSTM, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
    if (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in given)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    ):
        return State(*Unrolled.apply(sizes, *given))
    return run(x, keep, start, sizes, w)


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
        state, made = step(rows, mask, State(*(t[:b] for t in state)), w)
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
        ctx.save_for_backward(*given, *states, *(t for made in steps for t in made.tensors()))
        ctx.set_materialize_grads(False)
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        given, states, made = saved[: ctx.given], saved[ctx.given :][:4], saved[ctx.given + 4 :]
        if torch.is_grad_enabled():
            return None, *_differentiable(ctx.sizes, given, grads)
        x, keep, *rest = given
        each = len(made) // len(ctx.sizes)
        steps = [Step.of(made[at : at + each]) for at in range(0, len(made), each)]
        start, w = State(*rest[:4]), Weights.of(rest[4:])
        return None, *backward(x, keep, start, ctx.sizes, w, State(*states), steps, grads)


def _differentiable(
    sizes: Sequence[int], given: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of what was given, by autograd, which records how they came about."""
    # Views: what was given may depend on each other, and each gets its own share alone.
    own = [None if t is None else t.view_as(t) for t in given]
    x, keep, *rest = own
    states = run(x, keep, State(*rest[:4]), sizes, Weights.of(rest[4:]))  # type: ignore[arg-type]
    pairs = [(s, g) for s, g in zip(states, grads, strict=True) if g is not None]
    wanted = [t for t in own if t is not None and t.requires_grad]
    outputs, weights = zip(*pairs, strict=True)
    found = iter(
        torch.autograd.grad(outputs, wanted, weights, create_graph=True, allow_unused=True)
    )
    return [next(found) if t is not None and t.requires_grad else None for t in own]
