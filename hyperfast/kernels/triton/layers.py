"""The ops of single layers: what they take, checked, on flat rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hyperfast.kernels import eager
from hyperfast.kernels.triton import generated, grouped
from hyperfast.kernels.triton.launch import agree, expect, rows_of
from hyperfast.layout import TRANSFORMS, Generated


def hyper_linear(
    x: Tensor,
    h: Tensor,
    matrix: Tensor,
    matrix_bias: Tensor | None,
    vector: Tensor | None,
    vector_bias: Tensor | None,
    task_ids: Tensor | None,
    transform: str,
    plan: str,
) -> Tensor:
    made = Generated(matrix, matrix_bias, vector, vector_bias)
    agree(
        x=x,
        h=h,
        matrix=matrix,
        matrix_bias=matrix_bias,
        vector=vector,
        vector_bias=vector_bias,
    )
    made.check(x.shape[-1], h.shape[1])
    _known(transform)
    out, ins = matrix.shape[:2]
    rows = rows_of([x], [h], task_ids, len(h))
    if plan == "tile" and rows.ragged:
        return eager.hyper_linear(x, h, *made, task_ids, transform, plan)
    y = generated.forward(x.reshape(-1, ins), h, made, rows, transform, plan)
    return y.view(*x.shape[:-1], out)


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
    plan: str,
) -> tuple[Tensor, Tensor, Tensor]:
    made = Generated(matrix, matrix_bias, vector)
    agree(grad=grad, x=x, h=h, matrix=matrix, matrix_bias=matrix_bias, vector=vector)
    made.check(x.shape[-1], h.shape[1])
    _known(transform)
    out, ins = matrix.shape[:2]
    expect(grad, "grad", (*grad.shape[:-1], out))
    rows = rows_of([grad, x], [h], task_ids, len(h))
    if plan == "tile" and rows.ragged:
        return eager.hyper_linear_backward(
            grad, x, h, matrix, matrix_bias, vector, task_ids, transform, output_mask, plan
        )
    grad, x = grad.reshape(-1, out), x.reshape(-1, ins)
    return generated.backward(grad, x, h, made, rows, output_mask, transform, plan)


def _known(transform: str) -> None:
    if transform not in ("", *TRANSFORMS):
        raise ValueError(f"transform must be one of {['', *TRANSFORMS]}, got {transform!r}")


def hyper_linear_grad_h(
    grad: Tensor,
    x: Tensor,
    matrix: Tensor,
    vector: Tensor | None,
    task_ids: Tensor | None,
    tasks: int,
    plan: str,
) -> Tensor:
    agree(grad=grad, x=x, matrix=matrix, vector=vector)
    Generated(matrix, None, vector).check(x.shape[-1], matrix.shape[-1])
    out, ins = matrix.shape[:2]
    expect(grad, "grad", (*grad.shape[:-1], out))
    rows = rows_of([grad, x], [], task_ids, tasks)
    if plan == "tile" and rows.ragged:
        return eager.hyper_linear_grad_h(grad, x, matrix, vector, task_ids, tasks, plan)
    return generated.grad_h(grad.reshape(-1, out), x.reshape(-1, ins), matrix, vector, rows, plan)


def hyper_linear_grad_weight(
    grad: Tensor, x: Tensor, h: Tensor, task_ids: Tensor | None, vector: bool, plan: str
) -> Tensor:
    agree(grad=grad, x=x, h=h)
    rows = rows_of([grad, x], [h], task_ids, len(h))
    if plan == "tile" and rows.ragged:
        return eager.hyper_linear_grad_weight(grad, x, h, task_ids, vector, plan)
    grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    return generated.grad_weight(grad, x, h, rows, vector, plan)


def task_linear(x: Tensor, weight: Tensor, bias: Tensor | None, task_ids: Tensor | None) -> Tensor:
    agree(x=x, weight=weight, bias=bias)
    expect(x, "x", (*x.shape[:-1], weight.shape[2]))
    expect(bias, "bias", weight.shape[:2])
    rows = rows_of([x], [weight], task_ids, len(weight))
    y = grouped.linear(x.reshape(-1, x.shape[-1]), weight, bias, rows)
    return y.view(*x.shape[:-1], weight.shape[1])


def task_linear_grad_weight(grad: Tensor, x: Tensor, task_ids: Tensor | None, tasks: int) -> Tensor:
    agree(grad=grad, x=x)
    rows = rows_of([grad, x], [], task_ids, tasks)
    return grouped.outer(grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]), rows)
