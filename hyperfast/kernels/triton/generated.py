"""A generated layer and its derivatives by one of the plans; rows are flat, ``(R, width)``.

``contract`` stores no weights. ``materialize`` stores all, ``tile`` those of a block of tasks at a
time; both leave the generation to a library.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hyperfast.kernels import reference
from hyperfast.kernels.triton import grouped
from hyperfast.kernels.triton.activation import NOTHING, Finish
from hyperfast.kernels.triton.launch import Rows
from hyperfast.kernels.triton.trilinear import sum_outer, trilinear
from hyperfast.layout import Generated
from hyperfast.plans.choose import choose
from hyperfast.plans.gpu import GPU_BLOCK, arithmetic
from hyperfast.plans.sizes import Sizes


def _plan(rows: Rows, out: int, ins: int, features: int, dtype: torch.dtype) -> str:
    layer = Sizes(rows.tasks, rows.total, ins, out, features, ragged=rows.ragged)
    return choose(layer, dtype, arithmetic(dtype))


def forward(
    x: Tensor,
    h: Tensor,
    made: Generated,
    rows: Rows,
    plan: str = "",
    then: Finish = NOTHING,
) -> Tensor:
    """``(R, O)`` from ``x (R, I)``, and what follows the layer."""
    matrix, matrix_bias, vector, vector_bias = made
    out, ins, features = matrix.shape
    plan = plan or _plan(rows, out, ins, features, x.dtype)
    if plan == "tile":
        y = x.new_empty(len(x), out)
        for t, r, part in _blocks(rows, matrix):
            y[r] = forward(x[r], h[t], made, part, "materialize", then.at(r))
        return y
    if plan == "materialize":
        w = reference.weights(h, matrix, matrix_bias)
        return grouped.linear(x, w, reference.biases(h, vector, vector_bias), rows, then)
    return trilinear(
        (x, False), (h, True), matrix, matrix_bias, vector, vector_bias, rows, x.dtype, then
    )


def grad_h(
    grad: Tensor, x: Tensor, matrix: Tensor, vector: Tensor | None, rows: Rows, plan: str = ""
) -> Tensor:
    """``(B, K)``."""
    out, ins, features = matrix.shape
    plan = plan or _plan(rows, out, ins, features, x.dtype)
    if plan == "tile":
        y = grad.new_empty(rows.tasks, features)
        for t, r, part in _blocks(rows, matrix):
            y[t] = grad_h(grad[r], x[r], matrix, vector, part, "materialize")
        return y
    if plan == "materialize":
        y = grouped.outer(grad, x, rows).flatten(1) @ matrix.flatten(0, 1)
        return y if vector is None else y + _sums(grad, rows) @ vector
    single = not rows.ragged and rows.per_task == 1
    each = trilinear(
        (grad, False),
        (x, False),
        matrix.permute(2, 0, 1),
        None if vector is None else vector.mT,
        None,
        None,
        rows,
        # What is summed again is not rounded to 16 bits in between.
        grad.dtype if single else torch.promote_types(grad.dtype, torch.float32),
    )
    if single:
        return each
    if not rows.ragged:
        return each.view(rows.tasks, rows.per_task, features).sum(1).to(grad.dtype)
    return _sums(each, rows).to(grad.dtype)


def grad_weight(
    grad: Tensor, x: Tensor, h: Tensor, rows: Rows, vector: bool, plan: str = ""
) -> Tensor:
    """``(O*I [+ O], K)``."""
    out, ins, features = grad.shape[1], x.shape[1], h.shape[1]
    n = out * ins
    plan = plan or _plan(rows, out, ins, features, x.dtype)
    if plan == "materialize":
        return _grad_flat(grad, x, rows, vector).mT @ h
    if plan == "tile":  # summed in fp32, or the rounding would grow with the number of blocks
        total = torch.promote_types(grad.dtype, torch.float32)
        y = grad.new_zeros(n + out * vector, features, dtype=total)
        for t, r, part in _blocks(rows, y[:n].unflatten(0, (out, ins))):
            y += _grad_flat(grad[r], x[r], part, vector).mT @ h[t]
        return y.to(grad.dtype)
    y = grad.new_empty(n + out * vector, features)
    sum_outer((grad, False), (x, False), (h, True), y[:n].unflatten(0, (out, ins)), rows)
    if vector:
        sum_outer((_ones(grad), False), (grad, False), (h, True), y[n:].unsqueeze(0), rows)
    return y


def _grad_flat(grad: Tensor, x: Tensor, rows: Rows, vector: bool) -> Tensor:
    """``(B, O*I [+ O])``: the gradients of the weights and biases of every task."""
    w = grouped.outer(grad, x, rows).flatten(1)
    return torch.cat([w, _sums(grad, rows)], 1) if vector else w


def _sums(each: Tensor, rows: Rows) -> Tensor:
    """``(B, C)``: the sum of the rows of each task."""
    return grouped.outer(each, _ones(each), rows).squeeze(2)


def _ones(rows: Tensor) -> Tensor:
    """A constant input feature: the gradient of a bias is that of its weight."""
    return rows.new_ones(()).expand(len(rows), 1)


def _blocks(rows: Rows, matrix: Tensor) -> Iterator[tuple[slice, slice, Rows]]:
    """Tasks whose generated weights fit half of the cache, their rows, and what these are."""
    params = max(matrix.shape[0] * (matrix.shape[1] + 1), 1)
    n, step = rows.per_task, max(1, GPU_BLOCK // (matrix.element_size() * params))
    for t in range(0, rows.tasks, step):
        end = min(t + step, rows.tasks)
        yield slice(t, end), slice(t * n, end * n), Rows(end - t, (end - t) * n, n)
