"""The three plans of a generated layer in plain PyTorch: what runs where no kernel is built.

``materialize`` is the specification itself. ``tile`` is the same, one block of tasks at a time, so
that the generated weights stay in cache. ``contract`` never forms the weights: a layer is the
trilinear form ``y[r,o] = sum_ik V[o,i,k] x[r,i] h[r,k]``, and so is each of its derivatives. With a
transform of the weights it is none: then ``tile`` runs instead.

Signatures are those of the registered ops; shapes are those of :mod:`hyperfast.kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hyperfast.kernels import reference
from hyperfast.plans.choose import choose
from hyperfast.plans.sizes import BLOCK, Sizes


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
    made = matrix, matrix_bias, vector, vector_bias
    out, ins, features = matrix.shape
    touched, task_ids = _touched(task_ids, len(h))
    h = h if touched is None else h.index_select(0, touched)
    plan = plan or _choose(x, len(h), out, ins, features, task_ids)
    if plan == "materialize":
        return reference.hyper_linear(x, h, *made, task_ids, transform)
    if plan == "tile" or transform:
        y = x.new_empty(*x.shape[:-1], out)
        for tasks, rows, ids in _task_blocks(task_ids, len(h), out * (ins + 1)):
            y[rows] = reference.hyper_linear(x[rows], h[tasks], *made, ids, transform)
        return y
    y = _contract(x, h, matrix, matrix_bias, task_ids)
    b = reference.biases(h, vector, vector_bias)
    if b is not None:
        y += b.unsqueeze(1) if task_ids is None else b.index_select(0, task_ids)
    return y


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
    (out, ins, features), tasks = matrix.shape, len(h)
    touched, task_ids = _touched(task_ids, tasks)
    h = h if touched is None else h.index_select(0, touched)
    plan = plan or _choose(x, len(h), out, ins, features, task_ids)
    made, has_vector = (matrix, matrix_bias, vector), vector is not None
    if plan == "materialize":
        grads = reference.hyper_linear_backward(grad, x, h, *made, task_ids, transform, output_mask)
    elif plan == "tile" or transform:
        params, wide = out * (ins + has_vector), torch.promote_types(x.dtype, torch.float32)
        shapes = h.shape, (params, features), (params,)
        totals = [
            x.new_zeros(s if wanted else 0, dtype=wide)
            for s, wanted in zip(shapes, output_mask, strict=True)
        ]
        for block, rows, ids in _task_blocks(task_ids, len(h), out * (ins + 1)):
            part = reference.hyper_linear_backward(
                grad[rows], x[rows], h[block], *made, ids, transform, output_mask
            )
            totals[0][block] += part[0]
            totals[1] += part[1]
            totals[2] += part[2]
        of_h, of_weight, of_bias = (t.to(x.dtype) for t in totals)
        grads = of_h, of_weight, of_bias
    else:
        none, whole, one = x.new_empty(0), _rows(grad).unsqueeze(0), _rows(x).unsqueeze(0)
        grads = (
            hyper_linear_grad_h(grad, x, matrix, vector, task_ids, len(h), plan)
            if output_mask[0]
            else none,
            hyper_linear_grad_weight(grad, x, h, task_ids, has_vector, plan)
            if output_mask[1]
            else none,
            reference.grad_flat(whole, one, None, 1, has_vector).squeeze(0)
            if output_mask[2]
            else none,
        )
    if touched is None or not output_mask[0]:
        return grads
    return h.new_zeros(tasks, features).index_copy_(0, touched, grads[0]), *grads[1:]


def hyper_linear_grad_h(
    grad: Tensor,
    x: Tensor,
    matrix: Tensor,
    vector: Tensor | None,
    task_ids: Tensor | None,
    tasks: int,
    plan: str,
) -> Tensor:
    out, ins, features = matrix.shape
    touched, local = _touched(task_ids, tasks)
    if touched is not None:
        gh = hyper_linear_grad_h(grad, x, matrix, vector, local, len(touched), plan)
        return gh.new_zeros(tasks, features).index_copy_(0, touched, gh)
    plan = plan or _choose(x, tasks, out, ins, features, task_ids)
    if plan == "materialize":
        return reference.hyper_linear_grad_h(grad, x, matrix, vector, task_ids, tasks)
    if plan == "tile":
        gh = grad.new_empty(tasks, features)
        for block, rows, ids in _task_blocks(task_ids, tasks, out * (ins + 1)):
            count = block.stop - block.start
            gh[block] = reference.hyper_linear_grad_h(
                grad[rows], x[rows], matrix, vector, ids, count
            )
        return gh
    per_row = _trilinear(_rows(grad), _rows(x), matrix.permute(2, 0, 1))
    if vector is not None:
        per_row += _rows(grad) @ vector
    if task_ids is None:
        per_row = per_row.view(*grad.shape[:-1], features)
    return reference.sum_rows(per_row, task_ids, tasks)


def hyper_linear_grad_weight(
    grad: Tensor, x: Tensor, h: Tensor, task_ids: Tensor | None, vector: bool, plan: str
) -> Tensor:
    out, ins, features = grad.shape[-1], x.shape[-1], h.shape[1]
    touched, task_ids = _touched(task_ids, len(h))
    h = h if touched is None else h.index_select(0, touched)
    plan = plan or _choose(x, len(h), out, ins, features, task_ids)
    if plan == "materialize":
        return reference.hyper_linear_grad_weight(grad, x, h, task_ids, vector)
    # Blocks of 16-bit inputs are summed in fp32, or the rounding would grow with their number.
    total_dtype = torch.promote_types(grad.dtype, torch.float32)
    n = out * ins
    total = grad.new_zeros(n + out * vector, features, dtype=total_dtype)
    if plan == "tile":
        for tasks, rows, ids in _task_blocks(task_ids, len(h), len(total)):
            total += reference.hyper_linear_grad_weight(grad[rows], x[rows], h[tasks], ids, vector)
        return total.to(grad.dtype)
    h = _rows_of(h, x, task_ids)
    grad, x = _rows(grad), _rows(x)
    for rows in _blocks(len(x), ins * features):
        pairs = (x[rows].unsqueeze(2) * h[rows].unsqueeze(1)).flatten(1)
        total[:n] += (grad[rows].mT @ pairs).view(n, features)
    if vector:
        total[n:] = grad.mT @ h
    return total.to(grad.dtype)


def _contract(
    x: Tensor, h: Tensor, v: Tensor, shared: Tensor | None, task_ids: Tensor | None
) -> Tensor:
    """``y[r,o] = sum_i x[r,i] (shared[o,i] + sum_k v[o,i,k] h[b(r),k])``."""
    rows = _rows(x)
    y = _trilinear(rows, _rows_of(h, x, task_ids), v)
    if shared is not None:
        y += rows @ shared.mT
    return y.view(*x.shape[:-1], len(v))


def _trilinear(a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """``y[r,c] = sum_ij v[c,i,j] a[r,i] b[r,j]``, by the smallest of its three temporaries.

    ``a (R, I)``, ``b (R, J)``, ``v (C, I, J)`` of any strides; returns ``(R, C)``.
    """
    c, i, j = v.shape
    width = min(i * j, c * j, c * i)
    if width == i * j:
        m = v.flatten(1).mT
    elif width == c * j:
        m = v.transpose(0, 1).flatten(1)
    else:
        return _trilinear(b, a, v.mT)  # the other operand goes first
    y = a.new_empty(len(a), c)
    for rows in _blocks(len(a), width):
        if width == i * j:
            y[rows] = (a[rows].unsqueeze(2) * b[rows].unsqueeze(1)).flatten(1) @ m
        else:
            made = (a[rows] @ m).view(rows.stop - rows.start, c, j)
            y[rows] = torch.bmm(made, b[rows].unsqueeze(2)).squeeze(2)
    return y


def _rows(t: Tensor) -> Tensor:
    """``(R, C)``; -1 would not do where there are no columns."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _rows_of(h: Tensor, x: Tensor, task_ids: Tensor | None) -> Tensor:
    """``(R, K)``: the features of the task of every row of ``x``."""
    if task_ids is not None:
        return h.index_select(0, task_ids)
    return h.unsqueeze(1).expand(-1, x.shape[1], -1).reshape(-1, h.shape[1])


def _touched(task_ids: Tensor | None, tasks: int) -> tuple[Tensor | None, Tensor | None]:
    """The tasks that few mixed rows name, and the rows' ids among them: so the cost is that of the
    rows, however many tasks there are. ``None`` and the ids as they are where rows are not few."""
    if task_ids is None or len(task_ids) >= tasks:
        return None, task_ids
    return task_ids.unique(return_inverse=True)


def _blocks(count: int, width: int) -> Iterator[slice]:
    """Slices of ``range(count)`` of at most ``BLOCK`` elements, ``width`` each."""
    step = max(1, BLOCK // max(width, 1))
    return (slice(n, min(n + step, count)) for n in range(0, count, step))


def _task_blocks(
    task_ids: Tensor | None, tasks: int, params: int
) -> Iterator[tuple[slice, slice | Tensor, Tensor | None]]:
    """Blocks of tasks, the rows of each, and these rows' task ids counted from the block's first.

    ``params`` is the number of generated weights a task.
    """
    if task_ids is None:
        for block in _blocks(tasks, params):
            yield block, block, None
        return
    order = task_ids.argsort(stable=True)
    ends = task_ids.bincount(minlength=tasks).cumsum(0).tolist()
    for block in _blocks(tasks, params):
        first = ends[block.start - 1] if block.start else 0
        rows = order[first : ends[block.stop - 1]]
        yield block, rows, task_ids[rows] - block.start


def _choose(
    x: Tensor, tasks: int, out: int, ins: int, features: int, task_ids: Tensor | None
) -> str:
    rows = x.shape[:-1].numel()
    sizes = Sizes(tasks, rows, ins, out, features, ragged=task_ids is not None)
    return choose(sizes, x.dtype, x.device.type)
