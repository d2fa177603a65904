"""The registered ops: schemas, kernels, fakes, and the rules of autograd, vmap and jvp.

PyTorch's dispatcher is the registry: a backend registers its kernels for its device's key, and
where it has none the eager plans run. Only this file and :mod:`hyperfast.ops.network` name
``torch.library``.

The two families are closed under differentiation: ``hyper_linear`` is linear in ``x``, in ``h`` and
in the head's weight, and the gradient with respect to each is linear in the others again, so that
derivatives of every order stay inside them. Shapes are those of :mod:`hyperfast.kernels.reference`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hyperfast import checks
from hyperfast.kernels import eager, reference
from hyperfast.plans.choose import HAS_TRITON, PLANS

# What a tensor argument holds: an entry a row, an entry a task, the ids, or the same for all tasks.
ROW, TASK, IDS, SHARED = "row", "task", "ids", "shared"


def _triton(name: str) -> Callable[..., Tensor]:
    """The Triton kernel of an op; its module is imported at the first call."""

    def kernel(*args):
        from hyperfast.kernels import triton as triton_kernels

        return getattr(triton_kernels, name)(*args)

    return kernel


@contextmanager
def triton_on_cpu(names: Sequence[str]) -> Iterator[None]:
    """Within the context, the ops run their Triton kernels on CPU tensors: for Triton's
    interpreter, which is chosen by ``TRITON_INTERPRET=1`` before the first kernel is imported."""
    library = torch.library.Library("hyperfast", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden, which is the purpose
        for name in names:
            library.impl(name, _triton(name), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _define(
    name: str,
    schema: str,
    *,
    roles: Sequence[str],
    kernel: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    shape: Callable[..., Sequence[int]],
    backward: Callable[..., Sequence[Tensor | None]],
) -> Callable[..., Tensor]:
    """Registers one op and returns the function that calls it.

    Args:
        roles: the role of each tensor argument; tensors come first in every schema.
        kernel: runs where no backend has a kernel.
        plain: the specification, which every transform can trace; takes all arguments but the plan.
        shape: the output's shape, from the arguments.
        backward: ``(needs_input_grad, grad, *args)`` to a gradient for each of the first arguments.
    """
    torch.library.define(f"hyperfast::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.hyperfast, name).default
    arguments = op._schema.arguments
    count = len(roles)
    plan_count = int(arguments[-1].name == "plan")
    plain_count = len(arguments) - plan_count

    def checked(*args):
        given = [(r, t) for r, t in zip(roles, args, strict=False) if t is not None]
        by_role = {role: [t for r, t in given if r == role] for role in (ROW, TASK)}
        tasks, ids = _tasks(args, roles), args[roles.index(IDS)]
        checks.fitting(by_role[ROW], by_role[TASK], tasks, ids)
        checks.in_range(ids, tasks)
        if plan_count and args[-1] not in ("", *PLANS):
            raise ValueError(f"plan must be one of {['', *PLANS]}, got {args[-1]!r}")
        return kernel(*args)

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
        if not torch._C._are_functorch_transforms_active():
            if forward_ad._current_level >= 0:  # the dispatcher's ops have no forward mode
                return plain(*args[:plain_count])
            return op(*args)
        if torch.compiler.is_compiling():  # Dynamo cannot trace a Function with a vmap rule
            return plain(*args[:plain_count])
        return Rule.apply(*args)

    torch.library.impl(f"hyperfast::{name}", "CompositeExplicitAutograd", checked)
    if HAS_TRITON:
        torch.library.impl(f"hyperfast::{name}", "CUDA", _triton(name))
    torch.library.register_fake(op, lambda *args: args[0].new_empty(shape(*args)))
    torch.library.register_autograd(op, Rule.backward, setup_context=Rule.setup_context)
    torch.library.register_vmap(op, Rule.vmap)
    return call


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


def _hyper_linear_backward(need, grad, x, h, weight, bias, ids, target_bias, plan):
    n = grad.shape[-1] * x.shape[-1]
    shared = None if bias is None else bias[:n]
    return (
        hyper_linear_grad_x(grad, h, weight[:n], shared, ids, plan) if need[0] else None,
        hyper_linear_grad_h(grad, x, weight, ids, h.shape[0], target_bias, plan)
        if need[1]
        else None,
        hyper_linear_grad_weight(grad, x, h, ids, target_bias, plan) if need[2] else None,
        _grad_shared(grad, x, target_bias) if need[3] else None,
    )


def _hyper_linear_grad_x_backward(need, grad, g, h, weight, bias, ids, plan):
    return (
        hyper_linear(grad, h, weight, bias, ids, False, plan) if need[0] else None,
        hyper_linear_grad_h(g, grad, weight, ids, h.shape[0], False, plan) if need[1] else None,
        hyper_linear_grad_weight(g, grad, h, ids, False, plan) if need[2] else None,
        _grad_shared(g, grad, False) if need[3] else None,
    )


def _hyper_linear_grad_h_backward(need, grad, g, x, weight, ids, tasks, target_bias, plan):
    n = g.shape[-1] * x.shape[-1]
    return (
        hyper_linear(x, grad, weight, None, ids, target_bias, plan) if need[0] else None,
        hyper_linear_grad_x(g, grad, weight[:n], None, ids, plan) if need[1] else None,
        hyper_linear_grad_weight(g, x, grad, ids, target_bias, plan) if need[2] else None,
    )


def _hyper_linear_grad_weight_backward(need, grad, g, x, h, ids, target_bias, plan):
    n = g.shape[-1] * x.shape[-1]
    return (
        hyper_linear(x, h, grad, None, ids, target_bias, plan) if need[0] else None,
        hyper_linear_grad_x(g, h, grad[:n], None, ids, plan) if need[1] else None,
        hyper_linear_grad_h(g, x, grad, ids, h.shape[0], target_bias, plan) if need[2] else None,
    )


def _one(rows: Tensor) -> Tensor:
    """A constant input feature of 1: the gradient of a bias is that of its weight."""
    return rows.new_ones(()).expand(*rows.shape[:-1], 1)


def _grad_shared(grad: Tensor, x: Tensor, target_bias: bool) -> Tensor:
    """``(P,)``: the gradient of the head's bias, which all tasks share: they count as one."""
    grad, x = grad.reshape(1, -1, grad.shape[-1]), x.reshape(1, -1, x.shape[-1])
    weight = task_linear_grad_weight(grad, x, None, 1).reshape(-1)
    return torch.cat([weight, grad.sum((0, 1))]) if target_bias else weight


task_linear = _define(
    "task_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? task_ids) -> Tensor",
    roles=(ROW, TASK, TASK, IDS),
    kernel=reference.task_linear,
    plain=reference.task_linear,
    shape=lambda x, weight, *_: (*x.shape[:-1], weight.shape[1]),
    backward=_task_linear_backward,
)

task_linear_grad_weight = _define(
    "task_linear_grad_weight",
    "(Tensor grad, Tensor x, Tensor? task_ids, SymInt tasks) -> Tensor",
    roles=(ROW, ROW, IDS),
    kernel=reference.task_linear_grad_weight,
    plain=reference.task_linear_grad_weight,
    shape=lambda grad, x, _, tasks: (tasks, grad.shape[-1], x.shape[-1]),
    backward=_task_linear_grad_weight_backward,
)

hyper_linear = _define(
    "hyper_linear",
    "(Tensor x, Tensor h, Tensor weight, Tensor? bias, Tensor? task_ids, bool target_bias,"
    " str plan) -> Tensor",
    roles=(ROW, TASK, SHARED, SHARED, IDS),
    kernel=eager.hyper_linear,
    plain=reference.hyper_linear,
    shape=lambda x, h, weight, bias, ids, target_bias, plan: (
        *x.shape[:-1],
        reference.out_features(weight, x.shape[-1], target_bias),
    ),
    backward=_hyper_linear_backward,
)

hyper_linear_grad_x = _define(
    "hyper_linear_grad_x",
    "(Tensor grad, Tensor h, Tensor weight, Tensor? bias, Tensor? task_ids, str plan) -> Tensor",
    roles=(ROW, TASK, SHARED, SHARED, IDS),
    kernel=eager.hyper_linear_grad_x,
    plain=reference.hyper_linear_grad_x,
    shape=lambda grad, h, weight, *_: (*grad.shape[:-1], weight.shape[0] // grad.shape[-1]),
    backward=_hyper_linear_grad_x_backward,
)

hyper_linear_grad_h = _define(
    "hyper_linear_grad_h",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? task_ids, SymInt tasks, bool target_bias,"
    " str plan) -> Tensor",
    roles=(ROW, ROW, SHARED, IDS),
    kernel=eager.hyper_linear_grad_h,
    plain=reference.hyper_linear_grad_h,
    shape=lambda grad, x, weight, ids, tasks, *_: (tasks, weight.shape[1]),
    backward=_hyper_linear_grad_h_backward,
)

hyper_linear_grad_weight = _define(
    "hyper_linear_grad_weight",
    "(Tensor grad, Tensor x, Tensor h, Tensor? task_ids, bool target_bias, str plan) -> Tensor",
    roles=(ROW, ROW, TASK, IDS),
    kernel=eager.hyper_linear_grad_weight,
    plain=reference.hyper_linear_grad_weight,
    shape=lambda grad, x, h, ids, target_bias, plan: (
        grad.shape[-1] * (x.shape[-1] + target_bias),
        h.shape[1],
    ),
    backward=_hyper_linear_grad_weight_backward,
)

EXTENSION_ERROR = ""
if os.environ.get("HYPERFAST_NO_EXT") == "1":
    EXTENSION_ERROR = "HYPERFAST_NO_EXT=1 is set"
else:
    try:
        import hyperfast._C  # noqa: F401  (its load registers the CPU kernels)
    except ImportError as error:
        EXTENSION_ERROR = str(error)
