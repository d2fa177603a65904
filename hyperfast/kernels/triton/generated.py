"""A generated layer and its derivatives by one of the plans; rows are flat, ``(R, width)``.

``contract`` stores no weights. ``materialize`` stores all, ``tile`` those of a block of tasks at a
time; both leave the generation to a library.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast.kernels.triton import grouped
from hyperfast.kernels.triton.activation import NOTHING, Finish
from hyperfast.kernels.triton.launch import Rows
from hyperfast.kernels.triton.trilinear import sum_outer, trilinear
from hyperfast.plans import choose as plans


def choose(rows: Rows, out: int, ins: int, features: int, dtype: torch.dtype) -> str:
    layer = plans.Layer(rows.tasks, rows.total, ins, out, features, ragged=rows.ragged)
    return plans.choose(layer, dtype.itemsize, plans.arithmetic(dtype))


def forward(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    target_bias: bool,
    plan: str = "",
    then: Finish = NOTHING,
) -> Tensor:
    """``(R, O)`` from ``x (R, I)``, and what follows the layer."""
    ins = x.shape[1]
    out = len(weight) // (ins + target_bias)
    n = out * ins
    plan = plan or choose(rows, out, ins, h.shape[1], x.dtype)
    if plan == "tile":
        y = x.new_empty(len(x), out)
        for t, r, part in _blocks(rows, weight):
            y[r] = forward(x[r], h[t], weight, bias, part, target_bias, "materialize", then.at(r))
        return y
    if plan == "materialize":
        flat = F.linear(h, weight, bias)
        w, b = flat[:, :n].unflatten(1, (out, ins)), flat[:, n:] if target_bias else None
        return grouped.linear(x, w, b, rows, then)
    return trilinear(
        (x, False),
        (h, True),
        weight[:n].unflatten(0, (out, ins)),
        None if bias is None else bias[:n].view(out, ins),
        weight[n:] if target_bias else None,
        bias[n:] if target_bias and bias is not None else None,
        rows,
        x.dtype,
        then,
    )


def grad_x(
    grad: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    plan: str = "",
    then: Finish = NOTHING,
) -> Tensor:
    """``(R, I)``; ``weight`` and ``bias`` hold no rows of a target bias."""
    out = grad.shape[1]
    ins = len(weight) // out
    plan = plan or choose(rows, out, ins, h.shape[1], grad.dtype)
    if plan == "tile":
        y = grad.new_empty(len(grad), ins)
        for t, r, part in _blocks(rows, weight):
            y[r] = grad_x(grad[r], h[t], weight, bias, part, "materialize", then.at(r))
        return y
    if plan == "materialize":
        w = F.linear(h, weight, bias).unflatten(1, (out, ins))
        return grouped.linear(grad, w.mT, None, rows, then)
    return trilinear(
        (grad, False),
        (h, True),
        weight.unflatten(0, (out, ins)).transpose(0, 1),
        None if bias is None else bias.view(out, ins).mT,
        None,
        None,
        rows,
        grad.dtype,
        then,
    )


def grad_h(
    grad: Tensor, x: Tensor, weight: Tensor, rows: Rows, target_bias: bool, plan: str = ""
) -> Tensor:
    """``(B, K)``."""
    out, ins, features = grad.shape[1], x.shape[1], weight.shape[1]
    n = out * ins
    plan = plan or choose(rows, out, ins, features, x.dtype)
    if plan == "tile":
        y = grad.new_empty(rows.tasks, features)
        for t, r, part in _blocks(rows, weight):
            y[t] = _grad_flat(grad[r], x[r], part, target_bias) @ weight
        return y
    if plan == "materialize":
        return _grad_flat(grad, x, rows, target_bias) @ weight
    single = not rows.ragged and rows.per_task == 1
    each = trilinear(
        (grad, False),
        (x, False),
        weight[:n].unflatten(0, (out, ins)).permute(2, 0, 1),
        weight[n:].mT if target_bias else None,
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
    return grouped.outer(each, _ones(each), rows).squeeze(2).to(grad.dtype)


def grad_weight(
    grad: Tensor, x: Tensor, h: Tensor, rows: Rows, target_bias: bool, plan: str = ""
) -> Tensor:
    """``(P, K)``."""
    out, ins, features = grad.shape[1], x.shape[1], h.shape[1]
    n = out * ins
    plan = plan or choose(rows, out, ins, features, x.dtype)
    if plan == "tile":  # summed in fp32, or the rounding would grow with the number of blocks
        total = torch.promote_types(grad.dtype, torch.float32)
        y = grad.new_zeros(n + out * target_bias, features, dtype=total)
        for t, r, part in _blocks(rows, y):
            y += _grad_flat(grad[r], x[r], part, target_bias).mT @ h[t]
        return y.to(grad.dtype)
    if plan == "materialize":
        return _grad_flat(grad, x, rows, target_bias).mT @ h
    y = grad.new_empty(n + out * target_bias, features)
    sum_outer((grad, False), (x, False), (h, True), y[:n].unflatten(0, (out, ins)), rows)
    if target_bias:
        sum_outer((_ones(grad), False), (grad, False), (h, True), y[n:].unsqueeze(0), rows)
    return y


def _grad_flat(grad: Tensor, x: Tensor, rows: Rows, target_bias: bool) -> Tensor:
    """``(B, P)``: the gradient with respect to the generated vector of every task."""
    w = grouped.outer(grad, x, rows).flatten(1)
    if not target_bias:
        return w
    return torch.cat([w, grouped.outer(grad, _ones(grad), rows).flatten(1)], 1)


def _ones(rows: Tensor) -> Tensor:
    """A constant input feature: the gradient of a bias is that of its weight."""
    return rows.new_ones(()).expand(len(rows), 1)


def _blocks(rows: Rows, weight: Tensor) -> Iterator[tuple[slice, slice, Rows]]:
    """Tasks whose generated weights fit half of the cache, their rows, and what these are."""
    n, step = rows.per_task, max(1, plans.GPU_BLOCK // (weight.element_size() * len(weight)))
    for t in range(0, rows.tasks, step):
        end = min(t + step, rows.tasks)
        yield slice(t, end), slice(t * n, end * n), Rows(end - t, (end - t) * n, n)
