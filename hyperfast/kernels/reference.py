"""The specification: what every op means, in plain PyTorch, correct in any dtype on any device.

Every backend and every plan must equal these functions, in value and in every gradient.

Shapes: ``x (B, N, I)``, or ``(R, I)`` with ``task_ids (R,)``; features ``h (B, K)``; what makes a
generated layer of them, ``matrix (O, I, K)``, ``matrix_bias (O, I)``, ``vector (O, K)`` and
``vector_bias (O,)``, see :class:`hyperfast.layout.Generated`. A ``transform`` of the generated
matrix is a key of :data:`hyperfast.layout.TRANSFORMS`, or ``""``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast.layout import TRANSFORMS


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


def low_rank(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    init: Tensor | None = None,
    task_ids: Tensor | None = None,
) -> Tensor:
    """``y[r] = init[r] + b[b(r)] @ a[b(r)] @ x[r] + bias[b(r)]``; ``a (B, K, I)``, ``b (B, O, K)``,
    ``bias (B, O)``, and ``init`` shaped as ``y``."""
    y = task_linear(task_linear(x, a, None, task_ids), b, bias, task_ids)
    return y if init is None else init + y


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


def weights(h: Tensor, matrix: Tensor, matrix_bias: Tensor | None, transform: str = "") -> Tensor:
    """``W (B, O, I)``: ``W_b = f(matrix . h_b + matrix_bias)``, where ``f`` is the transform."""
    shared = None if matrix_bias is None else matrix_bias.flatten()
    w = F.linear(h, matrix.flatten(0, 1), shared).unflatten(1, matrix.shape[:2])
    return TRANSFORMS[transform].value(w) if transform else w


def biases(h: Tensor, vector: Tensor | None, vector_bias: Tensor | None) -> Tensor | None:
    """``c (B, O)``: ``c_b = vector . h_b + vector_bias``; ``None`` where there is neither."""
    if vector is not None:
        return F.linear(h, vector, vector_bias)
    return None if vector_bias is None else vector_bias.expand(len(h), -1)


def hyper_linear(
    x: Tensor,
    h: Tensor,
    matrix: Tensor,
    matrix_bias: Tensor | None = None,
    vector: Tensor | None = None,
    vector_bias: Tensor | None = None,
    task_ids: Tensor | None = None,
    transform: str = "",
) -> Tensor:
    """:func:`task_linear` with the :func:`weights` and :func:`biases` that are generated."""
    w = weights(h, matrix, matrix_bias, transform)
    return task_linear(x, w, biases(h, vector, vector_bias), task_ids)


def hyper_linear_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    matrix: Tensor,
    matrix_bias: Tensor | None,
    vector: Tensor | None,
    task_ids: Tensor | None,
    transform: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`hyper_linear` with respect to ``h (B, K)``, to ``matrix`` and
    ``vector (O*I [+ O], K)``, and to their biases ``(O*I [+ O],)``, back to back; ``(0,)`` for
    those that are not wanted. All are made of the gradients of ``W_b`` before it is transformed
    and of ``c_b``."""
    flat = grad_flat(grad, x, task_ids, len(h), vector is not None)
    if transform:
        slope = TRANSFORMS[transform].slope(weights(h, matrix, matrix_bias)).flatten(1)
        n = slope.shape[1]
        flat = torch.cat([flat[:, :n] * slope, flat[:, n:]], 1)
    rows = matrix.flatten(0, 1)
    rows = rows if vector is None else torch.cat([rows, vector])
    return (
        flat @ rows if output_mask[0] else x.new_empty(0),
        flat.mT @ h if output_mask[1] else x.new_empty(0),
        flat.sum(0) if output_mask[2] else x.new_empty(0),
    )


def hyper_linear_grad_h(
    grad: Tensor,
    x: Tensor,
    matrix: Tensor,
    vector: Tensor | None,
    task_ids: Tensor | None,
    tasks: int,
) -> Tensor:
    """``(B, K)``: the gradients of ``W_b`` and ``c_b`` times what generates these."""
    w = task_linear_grad_weight(grad, x, task_ids, tasks).flatten(1)
    grad_h = w @ matrix.flatten(0, 1)
    return grad_h if vector is None else grad_h + sum_rows(grad, task_ids, tasks) @ vector


def hyper_linear_grad_weight(
    grad: Tensor, x: Tensor, h: Tensor, task_ids: Tensor | None, vector: bool
) -> Tensor:
    """``(O*I [+ O], K)``: the gradient of ``matrix``, row-major, then that of ``vector``: sums over
    tasks of the gradients of ``W_b`` and ``c_b``, times ``h_b``."""
    return grad_flat(grad, x, task_ids, h.shape[0], vector).mT @ h


def grad_flat(grad: Tensor, x: Tensor, task_ids: Tensor | None, tasks: int, vector: bool) -> Tensor:
    """``(B, O*I [+ O])``: the gradients of ``W_b``, row-major, and of ``c_b``."""
    w = task_linear_grad_weight(grad, x, task_ids, tasks).flatten(1)
    return torch.cat([w, sum_rows(grad, task_ids, tasks)], 1) if vector else w
