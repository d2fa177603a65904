"""Layers of low rank, ``y[r] = init[r] + B_b A_b x[r] + bias_b``, as one op, and their derivative
as another, on the CPU in float32 and float64: what lies between the factors never leaves the
caches, and the sum with ``init``, what all tasks share, is no pass of its own.

``x (B, N, I)``, or ``(R, I)`` with ``task_ids (R,)``; ``a (B, K, I)``, ``b (B, O, K)``, ``bias (B,
O)``, and ``init`` of as many rows as ``x`` and ``O`` columns, to which ``add_low_rank_`` adds where
it lies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hyperfast.ops.define import count_flops, define_for_cpu
from hyperfast.ops.layer import task_linear
from hyperfast.ops.recorded import gradients, wanted_by_autograd

low_rank = define_for_cpu(
    "low_rank",
    "(Tensor x, Tensor a, Tensor b, Tensor? bias, Tensor? init, Tensor? task_ids) -> Tensor",
    lambda x, a, b, *_: x.new_empty(*x.shape[:-1], b.shape[1]),
)
add_low_rank_ = define_for_cpu(
    "add_low_rank_",
    "(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor? bias, Tensor? task_ids) -> ()",
    lambda *_: None,
)
low_rank_backward = define_for_cpu(
    "low_rank_backward",
    "(Tensor grad, Tensor x, Tensor a, Tensor b, Tensor? task_ids, bool[4] output_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, x, a, b, ids, mask: tuple(
        x.new_empty(shape if wanted else (0,))
        for shape, wanted in zip((x.shape, a.shape, b.shape, b.shape[:2]), mask, strict=True)
    ),
)


def _flops(x: Tensor, a: Tensor, b: Tensor) -> int:
    return x.shape[:-1].numel() * a.shape[1] * (a.shape[2] + b.shape[1])


count_flops(low_rank, lambda x, a, b, *_: _flops(x, a, b))
count_flops(add_low_rank_, lambda y, x, a, b, *_: _flops(x, a, b))
count_flops(  # B^T grad, and of each factor what is wanted; A x once more for that of B
    low_rank_backward,
    lambda grad, x, a, b, ids, mask: (
        x.shape[:-1].numel()
        * a.shape[1]
        * (b.shape[1] * (1 + mask[2]) + a.shape[2] * (mask[0] + mask[1] + mask[2]))
    ),
)


def by_layers(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, task_ids: Tensor | None
) -> Tensor:
    """What the op adds to ``init``, differentiable to any order."""
    return task_linear(task_linear(x, a, None, task_ids), b, bias, task_ids)


def _make(*args: Any) -> Tensor:
    x, a, b, bias, init, task_ids, spent = args
    with torch._C._AutoDispatchBelowAutograd():  # its layer in Python takes 5 us to do nothing
        if spent:
            add_low_rank_(init, x, a, b, bias, task_ids)
            return init
        return low_rank(x, a, b, bias, init, task_ids)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, a, b, bias, init, ids, spent = args
        ctx.save_for_backward(x, a, b, bias, ids)
        if spent:
            ctx.mark_dirty(init)
        return _make(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, bias, ids = ctx.saved_tensors
        *need, of_init, _, _ = ctx.needs_input_grad
        if not any(need):
            found: list[Tensor | None] = [None] * 4
        elif wanted_by_autograd([grad]):

            def run(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> list[Tensor]:
                return [by_layers(x, a, b, bias, ids)]

            found = gradients(run, (x, a, b, bias), [grad])
        else:
            with torch._C._AutoDispatchBelowAutograd():
                made = low_rank_backward(grad, x, a, b, ids, need)
            found = [t if n else None for t, n in zip(made, need, strict=True)]
        return *found, grad if of_init else None, None, None


def run(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    init: Tensor | None,
    task_ids: Tensor | None,
    spent: bool = False,
) -> Tensor:
    """The op as autograd needs it; the caller has asked for transforms and compilers. ``spent``:
    nobody reads ``init`` again, and the result may take its place. New memory for it would be read
    and written beside it, and often come page by page (64 adapters on 512 rows: 1.5 ms become 1.7
    or 2.1).
    """
    recorded = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, a, b, bias, init)
    )
    if spent:
        assert init is not None
        # To write into a view would take autograd copies of all that it is a view of.
        spent = init.is_contiguous() and not (recorded and init._is_view())
    args = x, a, b, bias, init, task_ids, spent
    if recorded:
        # Function.apply asks for functorch's transforms first, which the caller has done: 5 us.
        return super(torch.autograd.Function, _LowRank).apply(*args)
    return _make(*args)
