"""A generated layer and its derivatives by one of the plans; rows are flat, ``(R, width)``.

``contract`` stores no weights, and is linear in them. ``materialize`` stores all, ``tile`` those of
a block of tasks at a time; both leave the generation to a library, and a transform to the kernels
that use the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hyperfast.kernels import reference
from hyperfast.kernels.triton import grouped
from hyperfast.kernels.triton.activation import NOTHING, Finish
from hyperfast.kernels.triton.launch import Rows, up
from hyperfast.kernels.triton.trilinear import sum_outer, trilinear
from hyperfast.layout import Generated
from hyperfast.plans import gpu
from hyperfast.plans.choose import choose
from hyperfast.plans.sizes import Sizes


def _plan(rows: Rows, matrix: Tensor, transform: str, plan: str) -> str:
    if plan and not (transform and plan == "contract"):
        return plan
    out, ins, features = matrix.shape
    layer = Sizes(
        rows.tasks, rows.total, ins, out, features, rows.ragged, transform=bool(transform)
    )
    return choose(layer, matrix.dtype, gpu.arithmetic(matrix.dtype))


def forward(
    x: Tensor,
    h: Tensor,
    made: Generated,
    rows: Rows,
    transform: str = "",
    plan: str = "",
    then: Finish = NOTHING,
) -> Tensor:
    """``(R, O)`` from ``x (R, I)``, and what follows the layer."""
    matrix, matrix_bias, vector, vector_bias = made
    if transform and rows.few:
        h, rows = rows.alone(h)
    plan = _plan(rows, matrix, transform, plan)
    if plan == "tile":
        y = x.new_empty(len(x), len(matrix))
        for t, r, part in _blocks(rows, matrix):
            y[r] = forward(x[r], h[t], made, part, transform, "materialize", then.at(r))
        return y
    if plan == "materialize":
        w, c = _weights(h, matrix, matrix_bias), reference.biases(h, vector, vector_bias)
        return grouped.linear(x, w, c, rows, then, transform)
    return trilinear(
        (x, False), (h, True), matrix, matrix_bias, vector, vector_bias, rows, x.dtype, then
    )


def backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    made: Generated,
    rows: Rows,
    wanted: Sequence[bool],
    transform: str = "",
    plan: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``h``, ``(B, K)``, of the matrix and vector, ``(O*I [+ O], K)``, and of
    their biases, ``(O*I [+ O],)``, where ``wanted``.

    Where the gradients of the weights of every task are stored, they are so once for all three.
    """
    matrix, _, vector, _ = made
    of_h, of_weight, of_bias = wanted
    if transform and rows.few:
        each, alone = rows.alone(h)
        grad_h, *shared = backward(grad, x, each, made, alone, wanted, transform, plan)
        return grouped.sums(grad_h, rows) if of_h else grad_h, shared[0], shared[1]
    grad_h = grad_weight = grad_bias = grad.new_empty(0)
    if of_bias and not transform:  # that of weights which all tasks share: they count as one
        of_bias, grad_bias = False, (grad.mT @ x).flatten()
        grad_bias = grad_bias if vector is None else torch.cat([grad_bias, grad.sum(0)])
    if not (of_h or of_weight or of_bias):
        return grad_h, grad_weight, grad_bias
    plan = _plan(rows, matrix, transform, plan)
    if plan == "contract":
        if of_h:
            grad_h = _contract_grad_h(grad, x, matrix, vector, rows)
        if of_weight:
            grad_weight = _contract_grad_weight(grad, x, h, rows, vector is not None)
        return grad_h, grad_weight, grad_bias
    blocks: Iterable[tuple[slice, slice, Rows]] = [(slice(None), slice(None), rows)]
    if plan == "tile":
        blocks = _blocks(rows, matrix, 1 + bool(transform))
    of_tasks = []
    for t, r, part in blocks:
        each = _grad_flat(grad[r], x[r], h[t], made, part, transform)
        if of_h:
            of_tasks.append(_by_head(each, matrix, vector))
        if of_weight:
            grad_weight = _add(grad_weight, each.mT @ h[t])
        if of_bias:
            grad_bias = _add(grad_bias, each.sum(0))
    return (
        torch.cat(of_tasks) if of_h else grad_h,
        grad_weight.to(grad.dtype),
        grad_bias.to(grad.dtype),
    )


def grad_h(
    grad: Tensor, x: Tensor, matrix: Tensor, vector: Tensor | None, rows: Rows, plan: str
) -> Tensor:
    """``(B, K)``."""
    h = _shape(matrix, rows.tasks, matrix.shape[2])
    made = Generated(matrix, None, vector)
    return backward(grad, x, h, made, rows, (True, False, False), plan=plan)[0]


def grad_weight(grad: Tensor, x: Tensor, h: Tensor, rows: Rows, vector: bool, plan: str) -> Tensor:
    """``(O*I [+ O], K)``."""
    out, features = grad.shape[1], h.shape[1]
    made = Generated(
        _shape(h, out, x.shape[1], features), None, _shape(h, out, features) if vector else None
    )
    return backward(grad, x, h, made, rows, (False, True, False), plan=plan)[1]


def _shape(like: Tensor, *shape: int) -> Tensor:
    """What is asked for nothing but its shape."""
    return like.new_empty(()).expand(shape)


def _contract_grad_h(
    grad: Tensor, x: Tensor, matrix: Tensor, vector: Tensor | None, rows: Rows
) -> Tensor:
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
        return each.unflatten(0, (rows.tasks, rows.per_task)).sum(1).to(grad.dtype)
    return grouped.sums(each, rows).to(grad.dtype)


def _contract_grad_weight(grad: Tensor, x: Tensor, h: Tensor, rows: Rows, vector: bool) -> Tensor:
    out, ins = grad.shape[1], x.shape[1]
    n = out * ins
    y = grad.new_empty(n + out * vector, h.shape[1])
    sum_outer((grad, False), (x, False), (h, True), y[:n].unflatten(0, (out, ins)), rows)
    if vector:
        torch.mm(grad.mT, rows.each(h), out=y[n:])
    return y


def _weights(h: Tensor, matrix: Tensor, matrix_bias: Tensor | None) -> Tensor:
    """``(B, O, I)``, before their transform; of a transposed matrix without a copy of it."""
    if matrix.stride(0) < matrix.stride(1):
        shared = None if matrix_bias is None else matrix_bias.mT
        return reference.weights(h, matrix.transpose(0, 1), shared).mT
    return reference.weights(h, matrix, matrix_bias)


def _grad_flat(
    grad: Tensor, x: Tensor, h: Tensor, made: Generated, rows: Rows, transform: str
) -> Tensor:
    """``(B, O*I [+ O])``: the gradients of what the head makes for every task."""
    out, ins, _ = made.matrix.shape
    n = out * ins
    params = n if made.vector is None else n + out
    # Tasks begin at multiples of 16, which a library reads in wide pieces.
    each = grad.new_empty(rows.tasks, 16 * up(params, 16))[:, :params]
    again = _weights(h, made.matrix, made.matrix_bias) if transform else None
    grouped.outer(grad, x, rows, each[:, :n].unflatten(1, (out, ins)), again, transform)
    if made.vector is not None:
        grouped.sums(grad, rows, each[:, n:])
    return each


def _by_head(each: Tensor, matrix: Tensor, vector: Tensor | None) -> Tensor:
    """The gradients ``each (B, O*I [+ O])`` times what generates these."""
    n = matrix.shape[0] * matrix.shape[1]
    y = each[:, :n] @ matrix.flatten(0, 1)
    return y if vector is None else y + each[:, n:] @ vector


def _add(total: Tensor, part: Tensor) -> Tensor:
    """Blocks are summed in fp32, or the rounding would grow with their number."""
    if not total.numel():
        return part
    return total.to(torch.promote_types(part.dtype, torch.float32)).add_(part)


def _blocks(rows: Rows, matrix: Tensor, copies: int = 1) -> Iterator[tuple[slice, slice, Rows]]:
    """Tasks, so many ``copies`` of whose weights fit half of the cache, their rows, and what these
    are; at least one block."""
    params = max(matrix.shape[0] * (matrix.shape[1] + 1), 1)
    n, step = rows.per_task, max(1, gpu.GPU_BLOCK // (copies * matrix.element_size() * params))
    for t in range(0, max(rows.tasks, 1), step):
        end = min(t + step, rows.tasks)
        yield slice(t, end), slice(t * n, end * n), Rows(end - t, (end - t) * n, n)
