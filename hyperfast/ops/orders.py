"""Orders of contraction beyond those of one op; all are made of ops, so that derivatives of every
order stay among them.

A generated layer is a trilinear form, and so is each of its derivatives, with the roles of its
factors exchanged. Summed by destination it is what the gradient of features is: ``sum_r x_r (x)
h_r`` over the rows of a destination, times the matrix. Its own gradients are generated layers
whose features are the gradients of the destinations.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hyperfast.layout import Generated
from hyperfast.ops.layer import hyper_linear_grad_h, task_linear_grad_weight


def sum_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """``(count, C)``: the sums of ``rows (R, C)`` by ``index (R,)``, each in the order of its
    rows."""
    ones = rows.new_ones(()).expand(rows.shape[0], 1)
    return task_linear_grad_weight(rows, ones, index, count).squeeze(2)


def sum_by_destination(x: Tensor, h: Tensor, made: Generated, index: Tensor, count: int) -> Tensor:
    """``(count, O)``: generated layers of features ``h (R, K)``, one a row of ``x (R, I)``, summed
    by ``index (R,)``."""
    matrix, matrix_bias, vector, vector_bias = made
    shared = None if matrix_bias is None else matrix_bias.mT
    y = hyper_linear_grad_h(x, h, matrix.permute(1, 2, 0), shared, index, count, "")
    if vector is not None:
        y = y + sum_rows(h, index, count) @ vector.mT
    if vector_bias is not None:
        y = y + degrees(index, count).unsqueeze(1) * vector_bias
    return y


def degrees(index: Tensor, count: int) -> Tensor:
    """``(count,)`` int64: how many rows each destination has."""
    return index.new_zeros(count).index_add(0, index, index.new_ones(()).expand(index.shape[0]))


def project(x: Tensor, h: Tensor, made: Generated) -> Tensor:
    """``(B, N, O)``: the generated layers of features ``h (B, K)``, applied to the same rows
    ``x (N, I)``."""
    matrix, matrix_bias, vector, vector_bias = made  # sizes may be dynamic, which len() would fix
    out, ins, features = matrix.shape
    rows = x @ matrix.transpose(0, 1).reshape(ins, out * features)
    rows = rows.view(x.shape[0], out, features)
    if vector is not None:
        rows = rows + vector
    constant = None if matrix_bias is None else x @ matrix_bias.mT
    if vector_bias is not None:
        constant = (
            vector_bias.expand(x.shape[0], -1) if constant is None else constant + vector_bias
        )
    y = F.linear(h, rows.flatten(0, 1), None if constant is None else constant.flatten())
    return y.view(h.shape[0], x.shape[0], out)
