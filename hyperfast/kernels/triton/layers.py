"""The ops of single layers: what they take, checked, on flat rows."""

from __future__ import annotations

from torch import Tensor

from hyperfast.kernels import eager, reference
from hyperfast.kernels.triton import generated, grouped
from hyperfast.kernels.triton.launch import agree, expect, rows_of


def hyper_linear(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    task_ids: Tensor | None,
    target_bias: bool,
    plan: str,
) -> Tensor:
    ins = x.shape[-1]
    out = reference.out_features(weight, ins, target_bias)
    agree(x=x, h=h, weight=weight, bias=bias)
    expect(weight, "weight", (out * (ins + target_bias), h.shape[1]))
    expect(bias, "bias", weight.shape[:1])
    rows = rows_of([x], [h], task_ids, len(h))
    if plan == "tile" and rows.ragged:
        return eager.hyper_linear(x, h, weight, bias, task_ids, target_bias, plan)
    y = generated.forward(x.reshape(-1, ins), h, weight, bias, rows, target_bias, plan)
    return y.view(*x.shape[:-1], out)


def hyper_linear_grad_x(
    grad: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    task_ids: Tensor | None,
    plan: str,
) -> Tensor:
    out = grad.shape[-1]
    ins = len(weight) // out
    agree(grad=grad, h=h, weight=weight, bias=bias)
    expect(weight, "weight", (out * ins, h.shape[1]))
    expect(bias, "bias", weight.shape[:1])
    rows = rows_of([grad], [h], task_ids, len(h))
    if plan == "tile" and rows.ragged:
        return eager.hyper_linear_grad_x(grad, h, weight, bias, task_ids, plan)
    y = generated.grad_x(grad.reshape(-1, out), h, weight, bias, rows, plan)
    return y.view(*grad.shape[:-1], ins)


def hyper_linear_grad_h(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    task_ids: Tensor | None,
    tasks: int,
    target_bias: bool,
    plan: str,
) -> Tensor:
    out, ins = grad.shape[-1], x.shape[-1]
    agree(grad=grad, x=x, weight=weight)
    expect(weight, "weight", (out * (ins + target_bias), weight.shape[1]))
    rows = rows_of([grad, x], [], task_ids, tasks)
    if plan == "tile" and rows.ragged:
        return eager.hyper_linear_grad_h(grad, x, weight, task_ids, tasks, target_bias, plan)
    grad, x = grad.reshape(-1, out), x.reshape(-1, ins)
    return generated.grad_h(grad, x, weight, rows, target_bias, plan)


def hyper_linear_grad_weight(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    task_ids: Tensor | None,
    target_bias: bool,
    plan: str,
) -> Tensor:
    agree(grad=grad, x=x, h=h)
    rows = rows_of([grad, x], [h], task_ids, len(h))
    if plan == "tile" and rows.ragged:
        return eager.hyper_linear_grad_weight(grad, x, h, task_ids, target_bias, plan)
    grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    return generated.grad_weight(grad, x, h, rows, target_bias, plan)


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
