"""The specification: what every op means, in plain PyTorch, correct in any dtype on any device.

Every backend and every plan must equal these functions, in value and in every gradient.

Shapes: ``x (B, N, I)``, or ``(R, I)`` with ``task_ids (R,)``; ``h (B, K)``; the head's slice of one
layer ``weight (P, K)`` and ``bias (P,)`` with ``P = O*I + O`` (``target_bias``) or ``O*I``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def task_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, task_ids: Tensor | None = None
) -> Tensor:
    """``y[r] = weight[b(r)] @ x[r] + bias[b(r)]``; ``weight (B, O, I)``, ``bias (B, O)``."""
    if task_ids is not None:
        bias = None if bias is None else bias.index_select(0, task_ids)
        return task_linear(x.unsqueeze(1), weight.index_select(0, task_ids), bias).squeeze(1)
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def task_linear_grad_weight(grad: Tensor, x: Tensor, task_ids: Tensor | None, tasks: int) -> Tensor:
    """``(B, O, I)``: the sum over the rows ``r`` of task ``b`` of ``grad[r, o] * x[r, i]``."""
    if task_ids is None:
        return torch.bmm(grad.mT, x)
    rows = grad.unsqueeze(2) * x.unsqueeze(1)
    return rows.new_zeros(tasks, *rows.shape[1:]).index_add(0, task_ids, rows)


def sum_rows(rows: Tensor, task_ids: Tensor | None, tasks: int) -> Tensor:
    """``(B, C)``: the sum of the rows of each task."""
    if task_ids is None:
        return rows.sum(1)
    return rows.new_zeros(tasks, rows.shape[1]).index_add(0, task_ids, rows)


def hyper_linear(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    task_ids: Tensor | None = None,
    target_bias: bool = True,
) -> Tensor:
    """``task_linear`` with the weights that the head makes of ``h``: ``p_b = weight @ h_b + bias``,
    reshaped row-major to ``W_b (O, I)``, then ``bias_b (O,)``."""
    flat = F.linear(h, weight, bias)
    features = x.shape[-1]
    out = out_features(weight, features, target_bias)
    w = flat[:, : out * features].unflatten(1, (out, features))
    b = flat[:, out * features :] if target_bias else None
    return task_linear(x, w, b, task_ids)


def hyper_linear_grad_x(
    grad: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, task_ids: Tensor | None
) -> Tensor:
    """``W_b^T @ grad[r]``; ``weight (O*I, K)`` holds no rows of a target bias."""
    out = grad.shape[-1]
    w = F.linear(h, weight, bias).unflatten(1, (out, weight.shape[0] // out))
    return task_linear(grad, w.mT, None, task_ids)


def hyper_linear_grad_h(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    task_ids: Tensor | None,
    tasks: int,
    target_bias: bool,
) -> Tensor:
    """``(B, K)``: the gradient with respect to the generated vector ``p_b``, times ``weight``."""
    return grad_flat(grad, x, task_ids, tasks, target_bias) @ weight


def hyper_linear_grad_weight(
    grad: Tensor, x: Tensor, h: Tensor, task_ids: Tensor | None, target_bias: bool
) -> Tensor:
    """``(P, K)``: the sum over tasks of the gradient of ``p_b``, times ``h_b``."""
    return grad_flat(grad, x, task_ids, h.shape[0], target_bias).mT @ h


def grad_flat(
    grad: Tensor, x: Tensor, task_ids: Tensor | None, tasks: int, target_bias: bool
) -> Tensor:
    """``(B, P)``: the gradient with respect to the generated vector of every task."""
    w = task_linear_grad_weight(grad, x, task_ids, tasks).flatten(1)
    return torch.cat([w, sum_rows(grad, task_ids, tasks)], 1) if target_bias else w


def out_features(weight: Tensor, in_features: int, target_bias: bool) -> int:
    """``O``, from the rows of the head's slice."""
    return weight.shape[0] // (in_features + target_bias)
