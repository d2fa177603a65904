"""Layers of many networks at once, as functions: checked, cast, and sent to the backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hyperfast import checks
from hyperfast.activations import activate, encode
from hyperfast.kernels import reference
from hyperfast.layout import MLPSpec
from hyperfast.ops import backends as backend
from hyperfast.ops import layer as ops
from hyperfast.ops import network as mlp_ops
from hyperfast.plans.choose import PLANS

__all__ = ["hyper_linear", "hyper_mlp", "task_linear"]


def task_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, task_ids: Tensor | None = None
) -> Tensor:
    """Applies a linear layer of its own to the rows of every task.

    ``y[r] = weight[b(r)] @ x[r] + bias[b(r)]``, where ``b(r)`` is the task of row ``r``.

    Args:
        x: ``(B, N, in)``, ``(B, in)``, or ``(R, in)`` with ``task_ids``; any strides.
        weight: ``(B, out, in)``.
        bias: ``(B, out)`` or ``None``.
        task_ids: ``(R,)`` int64, the task of every row, in any order.

    Returns:
        ``x`` with its last dimension replaced by ``out``.

    Raises:
        ValueError: shapes or devices that disagree.
        TypeError: a tensor that is not floating-point, dtypes that disagree, ids not int64.
        IndexError: a task id outside ``[0, B)``.
    """
    x, weight, bias = checks.floating(x=x, weight=weight, bias=bias)
    if weight.ndim != 3:
        raise ValueError(f"weight must have shape (B, out, in), got {checks.shape(weight)}")
    tasks, out, ins = weight.shape
    if bias is not None and bias.shape != (tasks, out):
        raise ValueError(f"bias must have shape {(tasks, out)}, got {checks.shape(bias)}")
    checks.rows(x, ins, tasks, task_ids, "weight")
    return _run("task_linear", x, (weight, bias), task_ids, ())


def hyper_linear(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    task_ids: Tensor | None = None,
    *,
    target_bias: bool = True,
    plan: str | None = None,
) -> Tensor:
    """Generates a linear layer for every task and applies it, storing its weights only if it pays.

    Equals ``task_linear(x, w, b, task_ids)`` where ``w (B, out, in)`` and then ``b (B, out)`` are
    the consecutive pieces of ``F.linear(h, weight, bias)``: the last layer of a hypernetwork
    (Ha, Dai, Le 2016) fused with the first of its target.

    Args:
        x: ``(B, N, in)``, ``(B, in)``, or ``(R, in)`` with ``task_ids``; any strides.
        h: ``(B, H)`` features of every task.
        weight: ``(out*in + out, H)``, the head's weight; ``(out*in, H)`` without ``target_bias``.
        bias: ``(out*in + out,)``, the head's bias, or ``None``; ``(out*in,)`` likewise.
        task_ids: ``(R,)`` int64, the task of every row, in any order.
        target_bias: whether the generated layer has a bias.
        plan: ``"contract"``, ``"tile"`` or ``"materialize"``; ``None`` leaves it to the library.

    Returns:
        ``x`` with its last dimension replaced by ``out``.

    Raises:
        ValueError: shapes or devices that disagree, an unknown plan.
        TypeError: a tensor that is not floating-point, dtypes that disagree, ids not int64.
        IndexError: a task id outside ``[0, B)``.
    """
    x, h, weight, bias = checks.floating(x=x, h=h, weight=weight, bias=bias)
    if x.ndim == 0:
        raise ValueError("x must have shape (B, N, in), (B, in) or (R, in), got ()")
    if plan is not None and plan not in PLANS:
        raise ValueError(f"plan must be one of {list(PLANS)} or None, got {plan!r}")
    if h.ndim != 2:
        raise ValueError(f"h must have shape (B, H), got {checks.shape(h)}")
    if weight.ndim != 2 or weight.shape[1] != h.shape[1]:
        raise ValueError(
            f"weight must have shape (P, {h.shape[1]}) as h has {h.shape[1]} features, "
            f"got {checks.shape(weight)}"
        )
    params, ins = weight.shape[0], x.shape[-1]
    per_out = ins + target_bias
    if per_out == 0 or params == 0 or params % per_out:
        raise ValueError(
            f"weight must have a multiple of {per_out} rows (in_features {ins}"
            f"{' and a bias' if target_bias else ''}), got {params}"
        )
    if bias is not None and bias.shape != (params,):
        raise ValueError(f"bias must have shape ({params},), got {checks.shape(bias)}")
    checks.rows(x, ins, h.shape[0], task_ids, "h")
    return _run("hyper_linear", x, (h, weight, bias), task_ids, (bool(target_bias), plan or ""))


def hyper_mlp(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: MLPSpec,
    activations: Sequence[nn.Module | None],
    task_ids: Tensor | None = None,
) -> Tensor:
    """Generates a whole MLP for every task and applies it: :func:`hyper_linear` layer after layer,
    in one op where its kernels know all activations.

    Args:
        x: ``(B, N, in)``, ``(B, in)``, or ``(R, in)`` with ``task_ids``; any strides.
        h: ``(B, H)`` features of every task.
        weight: ``(P, H)``, the head's weight; layer by layer as ``spec`` lays them out.
        bias: ``(P,)``, the head's bias, or ``None``.
        spec: the layout of the generated vector.
        activations: the module after each layer, ``None`` for none.
        task_ids: ``(R,)`` int64, the task of every row, in any order.

    Returns:
        ``x`` with its last dimension replaced by the last width.

    Raises:
        ValueError: shapes or devices that disagree.
        TypeError: a tensor that is not floating-point, dtypes that disagree, ids not int64.
        IndexError: a task id outside ``[0, B)``.
    """
    return generated_mlp(x, h, weight, bias, spec, activations, task_ids, "h")


def generated_mlp(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: MLPSpec,
    activations: Sequence[nn.Module | None],
    task_ids: Tensor | None,
    source: str,
) -> Tensor:
    """:func:`hyper_mlp`; ``source`` names the argument that says how many tasks there are."""
    wanted = None
    if not checks.alike(x, h, weight, bias):
        wanted = checks.operands(x=x, h=h, weight=weight, bias=bias)
    if h.ndim != 2:
        raise ValueError(f"h must have shape (B, H), got {checks.shape(h)}")
    tasks, features = h.shape
    if weight.shape != (spec.numel, features):
        raise ValueError(
            f"weight must have shape {(spec.numel, features)}, got {checks.shape(weight)}"
        )
    if bias is not None and bias.shape != (spec.numel,):
        raise ValueError(f"bias must have shape ({spec.numel},), got {checks.shape(bias)}")
    checks.rows(x, spec.sizes[0], tasks, task_ids, source)
    text = encode(activations)
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if text is None or transformed or backend.forced == "reference":
        numels = [layer.numel for layer in spec.layers]
        biases = [None] * len(numels) if bias is None else bias.split(numels)
        for w, b, activation in zip(weight.split(numels), biases, activations, strict=True):
            x = hyper_linear(x, h, w, b, task_ids, target_bias=spec.bias)
            x = activate(activation, x)
        return x
    x, h, weight, bias = checks.cast(wanted, x, h, weight, bias)
    if backend.forced is not None:
        backend.insist(backend.forced, "hyper_mlp", x.device.type)
    single = task_ids is None and x.ndim == 2
    y = mlp_ops.run(x.unsqueeze(1) if single else x, h, weight, bias, task_ids, spec, text)
    return y.squeeze(1) if single else y


def task_mlp(
    x: Tensor,
    weight: Tensor,
    affine: Tensor | None,
    task_ids: Tensor | None,
    sizes: Sequence[int],
    target_bias: bool,
    activations: str,
) -> Tensor:
    """The op ``task_mlp``, or what :func:`hyperfast.use_backend` insists
    on; the caller has checked the arguments."""
    if backend.forced == "reference":
        checks.in_range(task_ids, len(weight))
        options = sizes, target_bias, activations
        linear = reference.task_linear
        return mlp_ops.by_task_layers(x, weight, affine, task_ids, *options, linear)
    if backend.forced is not None:
        backend.insist(backend.forced, "task_mlp", x.device.type)
    return mlp_ops.task_mlp(x, weight, affine, task_ids, sizes, target_bias, activations)


def _run(name: str, x: Tensor, tensors: tuple, task_ids: Tensor | None, options: tuple) -> Tensor:
    """Calls the op, or what :func:`hyperfast.use_backend` insists on; ``(B, in)`` is one row."""
    single = task_ids is None and x.ndim == 2
    if single:
        x = x.unsqueeze(1)
    if backend.forced == "reference":
        if not torch.compiler.is_compiling():
            checks.in_range(task_ids, tensors[0].shape[0])
        y = getattr(reference, name)(x, *tensors, task_ids, *options[:-1])
    else:
        if backend.forced is not None:
            backend.insist(backend.forced, name, x.device.type)
        y = getattr(ops, name)(x, *tensors, task_ids, *options)
    return y.squeeze(1) if single else y
