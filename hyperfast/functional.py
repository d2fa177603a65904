"""Layers of many networks at once, as functions: checked, cast, and sent to the backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hyperfast import checks
from hyperfast.activations import Activation, resolve, run_layers
from hyperfast.kernels import reference
from hyperfast.layout import Generated, MLPSpec
from hyperfast.ops import backends, layer, network, sharding
from hyperfast.plans.sizes import PLANS

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

    Example:
        >>> x, weight, ids = torch.randn(4, 8), torch.randn(3, 5, 8), torch.tensor([2, 0, 0, 2])
        >>> hyperfast.functional.task_linear(x, weight, task_ids=ids).shape
        torch.Size([4, 5])
    """
    x, weight, bias = checks.check_and_cast(x=x, weight=weight, bias=bias)
    if weight.ndim != 3:
        raise ValueError(f"weight must have shape (B, out, in), got {checks.shape(weight)}")
    tasks, out, ins = weight.shape
    if bias is not None and bias.shape != (tasks, out):
        raise ValueError(f"bias must have shape {(tasks, out)}, got {checks.shape(bias)}")
    checks.check_rows(x, ins, tasks, task_ids, "weight")
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

    Example:
        >>> x, h, head = torch.randn(3, 4, 8), torch.randn(3, 6), torch.nn.Linear(6, 5 * 8 + 5)
        >>> hyperfast.functional.hyper_linear(x, h, head.weight, head.bias).shape
        torch.Size([3, 4, 5])
    """
    x, h, weight, bias = checks.check_and_cast(x=x, h=h, weight=weight, bias=bias)
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
    per_out = ins + int(target_bias)
    if per_out == 0 or params == 0 or params % per_out:
        raise ValueError(
            f"weight must have a multiple of {per_out} rows (in_features {ins}"
            f"{' and a bias' if target_bias else ''}), got {params}"
        )
    if bias is not None and bias.shape != (params,):
        raise ValueError(f"bias must have shape ({params},), got {checks.shape(bias)}")
    checks.check_rows(x, ins, h.shape[0], task_ids, "h")
    made = Generated.of_head(weight, bias, ins, bool(target_bias))
    return _run("hyper_linear", x, (h, *made), task_ids, ("", plan or ""))


def hyper_mlp(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: MLPSpec,
    activations: Sequence[Activation | None],
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
        activations: after each layer a name, a module or a function, ``None`` for none.
        task_ids: ``(R,)`` int64, the task of every row, in any order.

    Returns:
        ``x`` with its last dimension replaced by the last width.

    Raises:
        ValueError: shapes or devices that disagree, activations that are not one a layer.
        TypeError: a tensor that is not floating-point, dtypes that disagree, ids not int64.
        IndexError: a task id outside ``[0, B)``.

    Example:
        >>> spec, x, h = hyperfast.MLPSpec((8, 7, 5)), torch.randn(3, 4, 8), torch.randn(3, 6)
        >>> head = torch.nn.Linear(6, spec.numel)
        >>> acts = [torch.nn.ReLU(), None]
        >>> hyperfast.functional.hyper_mlp(x, h, head.weight, head.bias, spec, acts).shape
        torch.Size([3, 4, 5])
    """
    if not isinstance(spec, MLPSpec):
        raise TypeError(f"spec must be an MLPSpec, got {type(spec).__name__}")
    if not isinstance(activations, Sequence) or isinstance(activations, str):
        raise TypeError(f"activations must be a sequence, one a layer, got {activations!r}")
    if len(activations) != len(spec.layers):
        raise ValueError(
            f"activations must hold {len(spec.layers)}, one a layer, got {len(activations)}"
        )
    modules = [None if a is None else resolve(a, "activations") for a in activations]
    return generated_mlp(x, h, weight, bias, spec, modules, task_ids, "h")


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
    if not checks.is_plain(x, h, weight, bias):
        wanted = checks.check_operands(x=x, h=h, weight=weight, bias=bias)
    if h.ndim != 2:
        raise ValueError(f"h must have shape (B, H), got {checks.shape(h)}")
    tasks, features = h.shape
    if weight.shape != (spec.numel, features):
        raise ValueError(
            f"weight must have shape {(spec.numel, features)}, got {checks.shape(weight)}"
        )
    if bias is not None and bias.shape != (spec.numel,):
        raise ValueError(f"bias must have shape ({spec.numel},), got {checks.shape(bias)}")
    checks.check_rows(x, spec.sizes[0], tasks, task_ids, source)
    text = spec.describe(activations)
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if text is None or transformed or backends.forced == "reference":
        numels = [v.numel for v in spec.layers]
        biases = [None] * len(numels) if bias is None else bias.split(numels)
        linears = [
            partial(hyper_linear, h=h, weight=w, bias=b, task_ids=task_ids, target_bias=spec.bias)
            for w, b in zip(weight.split(numels), biases, strict=True)
        ]
        return run_layers(x, linears, activations)
    x, h, weight, bias = checks.cast(wanted, x, h, weight, bias)
    if backends.forced is not None:
        backends.insist(backends.forced, "hyper_mlp", x.device.type)
    if type(x) is not Tensor:
        sharding.prepare(x)
    single = task_ids is None and x.ndim == 2
    y = network.run(x.unsqueeze(1) if single else x, h, weight, bias, task_ids, text)
    return y.squeeze(1) if single else y


def task_mlp(
    x: Tensor,
    weight: Tensor,
    scales_and_biases: Tensor | None,
    task_ids: Tensor | None,
    text: str,
) -> Tensor:
    """The op ``task_mlp``, or what :func:`hyperfast.use_backend` insists on; the caller has checked
    the arguments."""
    if backends.forced == "reference":
        checks.check_in_range(task_ids, len(weight))
        linear = reference.task_linear
        return network.by_task_layers(x, weight, scales_and_biases, task_ids, text, linear)
    if backends.forced is not None:
        backends.insist(backends.forced, "task_mlp", x.device.type)
    return network.task_mlp(x, weight, scales_and_biases, task_ids, text)


def _run(name: str, x: Tensor, tensors: tuple, task_ids: Tensor | None, options: tuple) -> Tensor:
    """Calls the op, or what :func:`hyperfast.use_backend` insists on; ``(B, in)`` is one row."""
    single = task_ids is None and x.ndim == 2
    if type(x) is not Tensor:
        sharding.prepare(x)
    if single:
        x = x.unsqueeze(1)
    if backends.forced == "reference":
        if not torch.compiler.is_compiling():
            checks.check_in_range(task_ids, tensors[0].shape[0])
        y = getattr(reference, name)(x, *tensors, task_ids)
    else:
        if backends.forced is not None:
            backends.insist(backends.forced, name, x.device.type)
        y = getattr(layer, name)(x, *tensors, task_ids, *options)
    return y.squeeze(1) if single else y
