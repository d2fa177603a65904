"""The ops of single layers, and their rules of autograd, vmap and jvp.

They are closed under differentiation: ``hyper_linear`` is linear in ``x``, in ``h`` and in what
makes the weights, and the gradient with respect to each is linear in the others again, so that
derivatives of every order stay inside. The gradient with respect to ``x`` is the same op with the
matrix transposed. Where a gradient is not differentiated itself, ``hyper_linear_backward`` makes
all that follow from the gradient of the weights, formed once. A transform of the weights leaves the
family: its second derivatives are those of the specification. Shapes are those of
:mod:`hyperfast.kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hyperfast import checks
from hyperfast.kernels import eager, reference
from hyperfast.layout import TRANSFORMS, Generated
from hyperfast.ops.define import (
    IDS,
    ROW,
    SHARED,
    TASK,
    count_flops,
    define,
    differentiate,
    vectorize,
)
from hyperfast.plans.sizes import PLANS


def _define(
    name: str,
    schema: str,
    *,
    roles: Sequence[str],
    returns: str,
    kernel: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    shape: Callable[..., Sequence[int]],
    flops: Callable[..., int],
    backward: Callable[..., Sequence[Tensor | None]],
) -> Callable[..., Tensor]:
    """Registers one op and returns the function that calls it.

    Args:
        roles, returns: of the tensor arguments, and of the result.
        kernel: runs where no backend has a kernel.
        plain: the specification, which every transform can trace; takes all arguments but the plan.
        shape: the output's shape, from the arguments.
        flops: multiply-adds, likewise.
        backward: ``(needs_input_grad, grad, *args)`` to a gradient for each of the first arguments.
    """

    def checked(*args):
        given = [(r, t) for r, t in zip(roles, args, strict=False) if t is not None]
        by_role = {role: [t for r, t in given if r == role] for role in (ROW, TASK)}
        tasks, ids = _tasks(args, roles), args[roles.index(IDS)]
        checks.check_rows_match(by_role[ROW], by_role[TASK], tasks, ids)
        checks.check_in_range(ids, tasks)
        if plan_count:
            _known("plan", args[-1], PLANS)
        y = kernel(*args)
        return y.clone() if y._is_view() else y  # a view could not be changed in place

    op = define(
        name, schema, (roles, [returns]), checked, lambda *args: args[0].new_empty(shape(*args))
    )
    arguments = op._schema.arguments
    count = len(roles)
    plan_count = int(arguments[-1].name == "plan")
    plain_count = len(arguments) - plan_count

    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            return op(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs[:count])
            ctx.save_for_forward(*inputs[:count])
            ctx.options = inputs[count:]

        @staticmethod
        def backward(ctx, grad):
            grads = backward(ctx.needs_input_grad, grad, *ctx.saved_tensors, *ctx.options)
            return *grads, *[None] * (len(arguments) - len(grads))

        @staticmethod
        def jvp(ctx, *tangents):
            args = [*ctx.saved_tensors, *ctx.options]
            moving = [n for n, t in enumerate(tangents) if t is not None]

            def along(*values):
                for n, value in zip(moving, values, strict=True):
                    args[n] = value
                return plain(*args[:plain_count])

            # Contiguous, as a dual tensor cannot be made of an expanded one.
            primals = tuple(args[n].contiguous() for n in moving)
            return torch.func.jvp(along, primals, tuple(tangents[n] for n in moving))[1]

        @staticmethod
        def vmap(info, in_dims, *args):
            if name != "hyper_linear_grad_weight":  # its output is a sum over the tasks
                folded = _fold(info.batch_size, in_dims, args, roles)
                if folded is not None:
                    return call(*folded).unflatten(0, (info.batch_size, -1)), 0
            options = args[count:plain_count]
            batched = torch.vmap(lambda *tensors: plain(*tensors, *options), in_dims[:count])
            return batched(*args[:count]), 0

    def call(*args: Any) -> Tensor:
        if torch._C._are_functorch_transforms_active():
            # Dynamo cannot trace a Function with a vmap rule, nor functionalize any.
            if torch.compiler.is_compiling() or _functionalizing():
                return plain(*args[:plain_count])
            return Rule.apply(*args)
        if forward_ad._current_level >= 0:  # the dispatcher's ops have no forward mode
            return plain(*args[:plain_count])
        if torch._C._get_tracing_state():  # a trace holds ops, and no Function of Python
            with torch.no_grad():
                return op(*args)
        return op(*args)

    differentiate(op, Rule.backward, Rule.setup_context)
    vectorize(op, Rule.vmap)
    count_flops(op, flops)
    return call


def _known(name: str, value: str, names: Iterable[str]) -> None:
    if value not in ("", *names):
        raise ValueError(f"{name} must be one of {['', *names]}, got {value!r}")


def _functionalizing() -> bool:
    top = torch._C._functorch.peek_interpreter_stack()
    return top is not None and top.key() == torch._C._functorch.TransformType.Functionalize


def _tasks(args: Sequence[Any], roles: Sequence[str]) -> int:
    """The number of tasks: the first size of a TASK argument, or the first option."""
    return len(args[roles.index(TASK)]) if TASK in roles else args[len(roles)]


def _fold(
    size: int, in_dims: Sequence[int | None], args: Sequence[Any], roles: Sequence[str]
) -> list[Any] | None:
    """The arguments of one call that does the work of ``size``: their tasks become more tasks.
    ``None`` where an argument that all tasks share differs from call to call."""
    if any(r is SHARED and d is not None for r, d in zip(roles, in_dims, strict=False)):
        return None
    folded: list[Any] = [
        a
        if r is SHARED or a is None
        else a.expand(size, *a.shape)
        if d is None
        else a.movedim(d, 0)
        for a, d, r in zip(args, in_dims, roles, strict=False)
    ]
    options = list(args[len(roles) :])
    if TASK in roles:
        tasks = folded[roles.index(TASK)].shape[1]
    else:
        tasks, options[0] = options[0], size * options[0]
    for n, role in enumerate(roles):
        if folded[n] is None or role is SHARED:
            continue
        if role is IDS:
            ids = folded[n]
            first = torch.arange(size, device=ids.device).unsqueeze(1) * tasks
            # An id out of range stays so: it must not land among the tasks of another call.
            moved = ids + first.where(ids < tasks, size * tasks)
            folded[n] = moved.where(ids >= 0, ids)
        folded[n] = folded[n].flatten(0, 1)
    return folded + options


def _task_linear_backward(need, grad, x, weight, bias, ids):
    return (
        task_linear(grad, weight.mT, None, ids) if need[0] else None,
        task_linear_grad_weight(grad, x, ids, weight.shape[0]) if need[1] else None,
        task_linear_grad_weight(grad, _one(grad), ids, weight.shape[0]).squeeze(2)
        if need[2]
        else None,
    )


def _task_linear_grad_weight_backward(need, grad, g, x, ids, tasks):
    return (
        task_linear(x, grad, None, ids) if need[0] else None,
        task_linear(g, grad.mT, None, ids) if need[1] else None,
    )


def _hyper_linear_backward(
    need, grad, x, h, matrix, matrix_bias, vector, vector_bias, ids, transform, plan
):
    grad_x = _grad_x(grad, h, matrix, matrix_bias, ids, plan, transform) if need[0] else None
    args = grad, x, h, matrix, matrix_bias, vector, ids
    shares = need[5] and vector is None  # a bias of all tasks
    mask = [need[1], need[2] or need[4], need[3] or (need[5] and not shares)]
    found: Sequence[Any] = (None, None, None)
    if any(mask):
        if not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            found = hyper_linear_backward(*args, transform, mask, plan)
        elif transform:
            found = reference.hyper_linear_backward(*args, transform, mask)
        else:
            found = _closed_backward(grad, x, h, matrix, vector, ids, mask, plan)
    out, ins = matrix.shape[:2]
    of_matrix, of_vector = _split(found[1], out, ins) if mask[1] else (None, None)
    of_bias, of_offset = _split(found[2], out, ins) if mask[2] else (None, None)
    return (
        grad_x,
        found[0] if need[1] else None,
        of_matrix if need[2] else None,
        of_bias if need[3] else None,
        of_vector if need[4] else None,
        _sum(grad) if shares else of_offset if need[5] else None,
    )


def _closed_backward(grad, x, h, matrix, vector, ids, mask, plan):
    """``hyper_linear_backward`` by ops that are differentiable."""
    bias = None
    if mask[2]:
        bias = grad_shared(grad, x).reshape(-1)
        if vector is not None:
            bias = torch.cat([bias, _sum(grad)])
    return (
        hyper_linear_grad_h(grad, x, matrix, vector, ids, len(h), plan) if mask[0] else None,
        hyper_linear_grad_weight(grad, x, h, ids, vector is not None, plan) if mask[1] else None,
        bias,
    )


def _hyper_linear_grad_h_backward(need, grad, g, x, matrix, vector, ids, tasks, plan):
    of_matrix, of_vector = None, None
    if need[2] or need[3]:
        flat = hyper_linear_grad_weight(g, x, grad, ids, need[3], plan)
        of_matrix, of_vector = _split(flat, *matrix.shape[:2])
    return (
        hyper_linear(x, grad, matrix, None, vector, None, ids, "", plan) if need[0] else None,
        _grad_x(g, grad, matrix, None, ids, plan) if need[1] else None,
        of_matrix if need[2] else None,
        of_vector if need[3] else None,
    )


def _hyper_linear_grad_weight_backward(need, grad, g, x, h, ids, vector, plan):
    matrix, of_vector = _split(grad, g.shape[-1], x.shape[-1])
    made = of_vector if vector else None
    return (
        hyper_linear(x, h, matrix, None, made, None, ids, "", plan) if need[0] else None,
        _grad_x(g, h, matrix, None, ids, plan) if need[1] else None,
        hyper_linear_grad_h(g, x, matrix, made, ids, h.shape[0], plan) if need[2] else None,
    )


def _grad_x(grad, h, matrix, matrix_bias, ids, plan, transform=""):
    shared = None if matrix_bias is None else matrix_bias.mT
    return hyper_linear(grad, h, matrix.transpose(0, 1), shared, None, None, ids, transform, plan)


def _split(flat: Tensor, out: int, ins: int) -> tuple[Tensor, Tensor]:
    """What is of a matrix and of a vector, back to back in ``flat (O*I [+ O], ...)``."""
    n = out * ins
    return flat[:n].reshape(out, ins, *flat.shape[1:]), flat[n:]


def _sum(rows: Tensor) -> Tensor:
    return rows.sum(tuple(range(rows.ndim - 1)))


def _one(rows: Tensor) -> Tensor:
    """A constant input feature of 1: the gradient of a bias is that of its weight."""
    return rows.new_ones(()).expand(*rows.shape[:-1], 1)


def grad_shared(grad: Tensor, x: Tensor) -> Tensor:
    """``(O, I)``: the gradient of a matrix that all tasks share: they count as one."""
    grad, x = grad.reshape(1, -1, grad.shape[-1]), x.reshape(1, -1, x.shape[-1])
    return task_linear_grad_weight(grad, x, None, 1).squeeze(0)


def _hyper_linear(x, h, matrix, matrix_bias, vector, vector_bias, ids, transform, plan):
    Generated(matrix, matrix_bias, vector, vector_bias).check(x.shape[-1], h.shape[-1])
    _known("transform", transform, TRANSFORMS)
    return eager.hyper_linear(x, h, matrix, matrix_bias, vector, vector_bias, ids, transform, plan)


def _hyper_linear_grads(grad, x, h, matrix, matrix_bias, vector, ids, transform, mask, plan):
    checks.check_rows_match([grad, x], [h], len(h), ids)
    checks.check_in_range(ids, len(h))
    Generated(matrix, matrix_bias, vector).check(x.shape[-1], h.shape[-1])
    if grad.shape[-1] != len(matrix):
        raise ValueError(f"grad must have {len(matrix)} columns, got {checks.shape(grad)}")
    _known("transform", transform, TRANSFORMS)
    _known("plan", plan, PLANS)
    args = grad, x, h, matrix, matrix_bias, vector, ids, transform, mask, plan
    return eager.hyper_linear_backward(*args)


def _hyper_linear_grads_fake(grad, x, h, matrix, matrix_bias, vector, ids, transform, mask, plan):
    out, ins, features = matrix.shape
    params = out * (ins + (vector is not None))
    shapes = h.shape, (params, features), (params,)
    return tuple(x.new_empty(s if n else (0,)) for s, n in zip(shapes, mask, strict=True))


def _hyper_linear_grad_h(grad, x, matrix, vector, ids, tasks, plan):
    Generated(matrix, None, vector).check(x.shape[-1], matrix.shape[-1])
    return eager.hyper_linear_grad_h(grad, x, matrix, vector, ids, tasks, plan)


def _layer_flops(x, h, matrix, vector) -> int:
    """Multiply-adds to make the weights of each task once, and to apply them."""
    out, ins, features = matrix.shape
    made = out * (ins + (vector is not None)) * features
    return len(h) * made + x.shape[:-1].numel() * out * ins


task_linear = _define(
    "task_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? task_ids) -> Tensor",
    roles=(ROW, TASK, TASK, IDS),
    returns=ROW,
    kernel=reference.task_linear,
    plain=reference.task_linear,
    shape=lambda x, weight, *_: (*x.shape[:-1], weight.shape[1]),
    flops=lambda x, weight, *_: x.numel() * weight.shape[1],
    backward=_task_linear_backward,
)

task_linear_grad_weight = _define(
    "task_linear_grad_weight",
    "(Tensor grad, Tensor x, Tensor? task_ids, SymInt tasks) -> Tensor",
    roles=(ROW, ROW, IDS),
    returns=TASK,
    kernel=reference.task_linear_grad_weight,
    plain=reference.task_linear_grad_weight,
    shape=lambda grad, x, _, tasks: (tasks, grad.shape[-1], x.shape[-1]),
    flops=lambda grad, x, *_: grad.numel() * x.shape[-1],
    backward=_task_linear_grad_weight_backward,
)

hyper_linear = _define(
    "hyper_linear",
    "(Tensor x, Tensor h, Tensor matrix, Tensor? matrix_bias, Tensor? vector, Tensor? vector_bias,"
    " Tensor? task_ids, str transform, str plan) -> Tensor",
    roles=(ROW, TASK, SHARED, SHARED, SHARED, SHARED, IDS),
    returns=ROW,
    kernel=_hyper_linear,
    plain=reference.hyper_linear,
    shape=lambda x, h, matrix, *_: (*x.shape[:-1], matrix.shape[0]),
    flops=lambda x, h, matrix, _, vector, *rest: _layer_flops(x, h, matrix, vector),
    backward=_hyper_linear_backward,
)

hyper_linear_backward = define(
    "hyper_linear_backward",
    "(Tensor grad, Tensor x, Tensor h, Tensor matrix, Tensor? matrix_bias, Tensor? vector,"
    " Tensor? task_ids, str transform, bool[3] output_mask, str plan) -> (Tensor, Tensor, Tensor)",
    ((ROW, ROW, TASK, SHARED, SHARED, SHARED, IDS), (TASK, SHARED, SHARED)),
    _hyper_linear_grads,
    _hyper_linear_grads_fake,
)
count_flops(
    hyper_linear_backward,
    lambda grad, x, h, matrix, matrix_bias, vector, ids, transform, mask, plan: (
        grad.numel() * x.shape[-1]
        + len(h) * matrix.numel() * (mask[0] + mask[1] + bool(transform))
        + (0 if vector is None else len(h) * vector.numel() * (mask[0] + mask[1]))
    ),
)

hyper_linear_grad_h = _define(
    "hyper_linear_grad_h",
    "(Tensor grad, Tensor x, Tensor matrix, Tensor? vector, Tensor? task_ids, SymInt tasks,"
    " str plan) -> Tensor",
    roles=(ROW, ROW, SHARED, SHARED, IDS),
    returns=TASK,
    kernel=_hyper_linear_grad_h,
    plain=reference.hyper_linear_grad_h,
    shape=lambda grad, x, matrix, vector, ids, tasks, _: (tasks, matrix.shape[2]),
    flops=lambda grad, x, matrix, vector, ids, tasks, _: (
        grad.numel() * x.shape[-1]
        + tasks * matrix.shape[0] * (matrix.shape[1] + (vector is not None)) * matrix.shape[2]
    ),
    backward=_hyper_linear_grad_h_backward,
)

hyper_linear_grad_weight = _define(
    "hyper_linear_grad_weight",
    "(Tensor grad, Tensor x, Tensor h, Tensor? task_ids, bool vector, str plan) -> Tensor",
    roles=(ROW, ROW, TASK, IDS),
    returns=SHARED,
    kernel=eager.hyper_linear_grad_weight,
    plain=reference.hyper_linear_grad_weight,
    shape=lambda grad, x, h, ids, vector, _: (
        grad.shape[-1] * (x.shape[-1] + vector),
        h.shape[1],
    ),
    flops=lambda grad, x, h, ids, vector, _: (
        grad.numel() * x.shape[-1] + h.numel() * grad.shape[-1] * (x.shape[-1] + vector)
    ),
    backward=_hyper_linear_grad_weight_backward,
)
