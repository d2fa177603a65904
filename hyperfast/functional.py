"""Layers of many networks at once, as functions: checked, cast, and sent to the backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from hyperfast import checks
from hyperfast.activations import Activation, resolve, run_layers
from hyperfast.kernels import reference
from hyperfast.layout import (
    LAYOUTS,
    Generated,
    MLPSpec,
    Transform,
    Trunk,
    at_least,
    check_transform,
    text_of_one,
    transformed,
)
from hyperfast.ops import backends, layer, network, sharding
from hyperfast.ops import trunk as trunk_ops
from hyperfast.ops.low_rank import run as run_low_rank
from hyperfast.ops.orders import degrees, project, sum_by_destination, sum_rows
from hyperfast.plans import cpu, orders
from hyperfast.plans.sizes import PLANS, Sizes

REDUCTIONS = ("sum", "mean")
ADDRESSES = 1 << 48  # of a process, at most: no memory holds more rows

__all__ = ["hyper_linear", "hyper_mlp", "task_linear"]


def task_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, task_ids: Tensor | None = None
) -> Tensor:
    """Applies a linear layer of its own to the rows of every task.

    ``y[r] = weight[b(r)] @ x[r] + bias[b(r)]``, where ``b(r)`` is the task of row ``r``.

    Args:
        x: ``(B, N, in)``, ``(B, in)``, ``(R, in)`` with ``task_ids``, or ``(1, N, in)``, the same
            rows for all tasks; any strides.
        weight: ``(B, out, in)``.
        bias: ``(B, out)`` or ``None``.
        task_ids: ``(R,)`` int64, the task of every row, in any order.

    Returns:
        ``x`` with its last dimension replaced by ``out``; ``(B, N, out)`` of shared rows.

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
    x = _for_all(x, tasks, task_ids)
    checks.check_rows(x, ins, tasks, task_ids, "weight")
    return _run("task_linear", x, (weight, bias), task_ids)


def low_rank_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    task_ids: Tensor | None,
    base: Callable[[Tensor], Tensor] | None,
    plain: bool,
) -> Tensor:
    """:func:`task_linear` by ``a (B, rank, in)``, then by ``b (B, out, rank)`` and ``bias``, plus
    what the base makes of ``x`` for all tasks; in one op of the CPU where it takes them. ``plain``:
    the base is ``F.linear``, and nobody else sees what it returns."""
    if not backends.runs_cpu_op((a, x, b, bias)):
        y = task_linear(task_linear(x, a, None, task_ids), b, bias, task_ids)
        return y if base is None else y + base(x)
    tasks, _, ins = a.shape
    rows = _for_all(x, tasks, task_ids)
    checks.check_rows(rows, ins, tasks, task_ids, "weight")
    shared = None if base is None else base(x)
    init, spent = None, False
    if type(shared) is Tensor and checks.is_plain(shared, x):  # a base may return anything
        wanted = torch.Size((*rows.shape[:-1], b.shape[1]))
        if shared.shape == wanted:
            init, spent, shared = shared, plain, None
        elif torch.broadcast_shapes(shared.shape, wanted) == wanted:
            init, shared = shared.expand(wanted), None
    if single := rows.ndim == 2 and task_ids is None:
        rows, init = rows.unsqueeze(1), None if init is None else init.unsqueeze(1)
    y = run_low_rank(rows, a, b, bias, init, task_ids, spent)
    y = y.squeeze(1) if single else y
    return y if shared is None else y + shared


def hyper_linear(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    task_ids: Tensor | None = None,
    *,
    target_bias: bool = True,
    layout: str = "oi",
    transform: Transform | None = None,
    index: Tensor | None = None,
    dim_size: int | None = None,
    reduce: str = "sum",
    plan: str | None = None,
) -> Tensor:
    """Generates a linear layer for every task and applies it, storing its weights only if it pays.

    Equals ``task_linear(x, w, b, task_ids)`` where ``w (B, out, in)`` and then ``b (B, out)`` are
    the consecutive pieces of ``F.linear(h, weight, bias)``: the last layer of a hypernetwork
    (Ha, Dai, Le 2016) fused with the first of its target. With ``index``, the rows of ``y`` are
    then added up by destination, as in a graph convolution whose edges have weights of their own
    (Gilmer et al. 2017); where that is less work, they are added up before they meet the head.

    Args:
        x: ``(B, N, in)``, ``(B, in)``, ``(R, in)`` with ``task_ids``, or ``(1, N, in)``, the same
            rows for all tasks; any strides.
        h: ``(B, H)`` features of every task.
        weight: ``(out*in + out, H)``, the head's weight; ``(out*in, H)`` without ``target_bias``.
        bias: ``(out*in + out,)``, the head's bias, or ``None``; ``(out*in,)`` likewise.
        task_ids: ``(R,)`` int64, the task of every row, in any order.
        target_bias: whether the generated layer has a bias.
        layout: ``"oi"``, or ``"io"``: the head's rows of the matrix are ordered ``(in, out)``.
        transform: of the matrix before it is used: ``"abs"``, ``"exp"``, ``"softplus"``,
            ``"square"``, or a function, for which the weights are stored.
        index: int64, the destination of every row, of the shape of ``x`` without its last
            dimension; where all tasks share their rows, it is the same for all.
        dim_size: how many destinations there are; by default one more than the largest, which
            reads ``index`` back and cannot be compiled.
        reduce: ``"sum"`` or ``"mean"``, which is 0 for a destination without rows.
        plan: ``"contract"``, ``"tile"`` or ``"materialize"``; ``None`` leaves it to the library.

    Returns:
        ``x`` with its last dimension replaced by ``out``; ``(B, N, out)`` of shared rows;
        ``(dim_size, out)`` with ``index``.

    Raises:
        ValueError: shapes or devices that disagree, an unknown plan, layout, transform or reduce.
        TypeError: a tensor that is not floating-point, dtypes that disagree, ids not int64.
        IndexError: a task id outside ``[0, B)``, a destination outside ``[0, dim_size)``.

    Example:
        >>> x, h, head = torch.randn(3, 4, 8), torch.randn(3, 6), torch.nn.Linear(6, 5 * 8 + 5)
        >>> hyperfast.functional.hyper_linear(x, h, head.weight, head.bias).shape
        torch.Size([3, 4, 5])
    """
    x, h, weight, bias = checks.check_and_cast(x=x, h=h, weight=weight, bias=bias)
    if x.ndim == 0:
        raise ValueError("x must have shape (B, N, in), (B, in) or (R, in), got ()")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {list(LAYOUTS)}, got {layout!r}")
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
    has_bias = bool(target_bias)
    by = None
    check_reduction(index, dim_size, reduce)
    if index is not None:
        by = destinations(index, dim_size, reduce, x).of_tasks(h.shape[0], x, task_ids)
    name = check_transform("transform", transform)
    simple = plan is None and by is None and layout == "oi" and ins > 0
    if (
        simple
        and name is not None
        and not _layer_by_layer()
        and not _shared(x, h.shape[0], task_ids)
    ):
        # As a network of one layer: its gradient is one piece, as the head's weight is.
        checks.check_rows(x, ins, h.shape[0], task_ids, "h")
        text = text_of_one(ins, params // per_out, has_bias, name)
        return _run_network(x, h, weight, bias, task_ids, text)
    made = Generated.of_head(weight, bias, ins, has_bias, layout)
    return generated_linear(x, h, made, task_ids, transform, by, plan)


def generated_linear(
    x: Tensor,
    h: Tensor,
    made: Generated,
    task_ids: Tensor | None = None,
    transform: Transform | None = None,
    by: Destinations | None = None,
    plan: str | None = None,
) -> Tensor:
    """:func:`hyper_linear` of the tensors that make a layer; their dtypes, and the shapes of all
    but ``x`` and ``task_ids``, have been checked."""
    if plan is not None and plan not in PLANS:
        raise ValueError(f"plan must be one of {list(PLANS)} or None, got {plan!r}")
    (tasks, features), (out, ins, _) = h.shape, made.matrix.shape
    shared = _shared(x, tasks, task_ids)
    x = _for_all(x, tasks, task_ids)
    checks.check_rows(x, ins, tasks, task_ids, "h")
    name = check_transform("transform", transform)
    if name is None:
        weights = reference.weights(h, made.matrix, made.matrix_bias)
        w = transformed(transform, weights, "transform")
        b = reference.biases(h, made.vector, made.vector_bias)
        y = task_linear(x, w, b, task_ids)
        return y if by is None else by.reduce(y)
    rows = math.prod(x.shape[:-1])  # Size.numel() would fix a dynamic one
    bias = made.vector is not None
    counts = _example(tasks), _example(rows)
    sizes = Sizes(*counts, ins, out, features, task_ids is not None, bias, bool(name))
    if plan is None and backends.forced is None:
        if by is not None and orders.destinations(sizes, _example(by.count), x.dtype.itemsize):
            if task_ids is not None:
                checks.check_in_range_if_known(task_ids, tasks, "task_ids")
                h = h.index_select(0, task_ids)
            elif x.ndim == 3:
                h = h.unsqueeze(1).expand(-1, x.shape[1], -1)
            rows_of = x.reshape(-1, ins), h.reshape(-1, features)
            return by.scale(sum_by_destination(*rows_of, made, by.index, by.count))
        if shared and orders.project(sizes, x.dtype.itemsize):
            y = project(x[0], h, made)
            return y if by is None else by.reduce(y)
    y = _run("hyper_linear", x, (h, *made), task_ids, (name,), plan or "")
    return y if by is None else by.reduce(y)


def check_reduction(index: Tensor | None, dim_size: int | None, reduce: str) -> None:
    """Raises ValueError for an unknown reduction, and for one of rows without destinations."""
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {list(REDUCTIONS)}, got {reduce!r}")
    if index is None and (dim_size is not None or reduce != "sum"):
        raise ValueError(
            "index must be given with dim_size and reduce, "
            f"got None with dim_size={dim_size} and reduce={reduce!r}"
        )


@dataclass(frozen=True)
class Destinations:
    """Where rows are added up: ``index (R,)`` in ``[0, count)``."""

    index: Tensor
    count: int
    mean: bool

    def of_tasks(self, tasks: int, x: Tensor, task_ids: Tensor | None) -> Destinations:
        """Those of the rows of all tasks, where ``x`` holds the same rows for all."""
        shared = _shared(x, tasks, task_ids)
        return replace(self, index=self.index.repeat(tasks)) if shared else self

    def reduce(self, y: Tensor) -> Tensor:
        """``(count, O)``, of rows ``y (..., O)``."""
        return self.scale(sum_rows(y.reshape(-1, y.shape[-1]), self.index, self.count))

    def scale(self, sums: Tensor) -> Tensor:
        if not self.mean:
            return sums
        return sums / degrees(self.index, self.count).clamp(min=1).unsqueeze(1)


def destinations(
    index: Tensor,
    dim_size: int | None,
    reduce: str,
    x: Tensor,
    rows: torch.Size | None = None,
    name: str = "index",
) -> Destinations:
    """The destinations of the rows of ``x``, checked; ``rows`` is their shape, by default that of
    ``x`` without its last dimension. ``name`` is that of the argument."""
    rows = x.shape[:-1] if rows is None else rows
    if checks.check_tensor(name, index).dtype != torch.int64:
        raise TypeError(f"{name} must have dtype torch.int64, got {index.dtype}")
    if index.shape != rows:
        raise ValueError(
            f"{name} must have shape {tuple(rows)}, one destination a row of x, "
            f"got {checks.shape(index)}"
        )
    if index.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {index.device}")
    flat = index.reshape(-1)
    if dim_size is None:
        low, high = (int(v) for v in flat.aminmax()) if flat.numel() else (0, -1)
        if low < 0 or high >= ADDRESSES:
            raise IndexError(f"{name} must be in [0, 2**48), got {low if low < 0 else high}")
        count = high + 1
    else:
        count = at_least("dim_size", dim_size, 0)
        checks.check_in_range_if_known(flat, count, name)
    return Destinations(flat, count, reduce == "mean")


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
        x: ``(B, N, in)``, ``(B, in)``, ``(R, in)`` with ``task_ids``, or ``(1, N, in)``, the same
            rows for all tasks; any strides.
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
    transform: str = "",
) -> Tensor:
    """:func:`hyper_mlp`; ``source`` names the argument that says how many tasks there are."""
    wanted = None
    if h is None or weight is None or not checks.is_plain(x, h, weight, bias):
        wanted = checks.check_operands(x=x, h=h, weight=weight, bias=bias)
    if h.ndim != 2:
        raise ValueError(f"h must have shape (B, H), got {checks.shape(h)}")
    tasks, features = h.shape
    x = _fitting(x, tasks, features, weight, bias, spec, task_ids, source)
    text = spec.describe(activations, transform)
    if text is None or _layer_by_layer():
        numels = [v.numel for v in spec.layers]
        biases = [None] * len(numels) if bias is None else bias.split(numels)
        linears = [
            partial(
                hyper_linear,
                h=h,
                weight=w,
                bias=b,
                task_ids=task_ids,
                target_bias=v.bias == "b",
                transform=transform or None,
            )
            for v, w, b in zip(spec.layers, weight.split(numels), biases, strict=True)
        ]
        return run_layers(x, linears, activations)
    x, h, weight, bias = checks.cast(wanted, x, h, weight, bias)
    return _run_network(x, h, weight, bias, task_ids, text)


def latent_mlp(
    x: Tensor,
    z: Tensor,
    trunk: Trunk,
    weight: Tensor,
    bias: Tensor | None,
    spec: MLPSpec,
    activations: Sequence[nn.Module | None],
    task_ids: Tensor | None,
    transform: str = "",
) -> Tensor | None:
    """:func:`generated_mlp` of the features that a trunk makes of latents ``z (B, z_dim)``, in one
    op of the CPU; ``None`` where there is none for them: then the trunk is called first. The caller
    has asked where latents are, and for compilers."""
    if (
        not cpu.takes_trunk(trunk.numel, z.dtype)
        or backends.forced not in (None, "cpp")
        or not checks.PLAIN.issuperset(map(type, given := (x, z, weight, bias, *trunk.tensors)))
        or checks.is_transformed()
        or not checks.is_plain(*given)
        or torch._C._get_tracing_state()  # a trace holds ops, and no Function of Python
    ):
        return None
    text = spec.describe(activations, transform)
    if text is None:
        return None
    x = _fitting(x, z.shape[0], trunk.features, weight, bias, spec, task_ids, "z")
    single = task_ids is None and x.ndim == 2
    rows = x.unsqueeze(1) if single else x
    y = trunk_ops.run(rows, z, trunk.tensors, weight, bias, task_ids, trunk.text, text)
    return y.squeeze(1) if single else y


def _fitting(
    x: Tensor,
    tasks: int,
    features: int,
    weight: Tensor,
    bias: Tensor | None,
    spec: MLPSpec,
    task_ids: Tensor | None,
    source: str,
) -> Tensor:
    """``x`` for all tasks, after all shapes have been checked."""
    if weight.shape != (spec.numel, features):
        raise ValueError(
            f"weight must have shape {(spec.numel, features)}, got {checks.shape(weight)}"
        )
    if bias is not None and bias.shape != (spec.numel,):
        raise ValueError(f"bias must have shape ({spec.numel},), got {checks.shape(bias)}")
    if isinstance(x, Tensor):
        x = _for_all(x, tasks, task_ids)
    checks.check_rows(x, spec.sizes[0], tasks, task_ids, source)
    return x


def _run_network(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    task_ids: Tensor | None,
    text: str,
) -> Tensor:
    """The op ``hyper_mlp``; ``(B, in)`` is one row a task."""
    if backends.forced is not None:
        backends.insist(backends.forced, "hyper_mlp", x.device.type)
    if type(x) is not Tensor:
        sharding.prepare(x)
    single = task_ids is None and x.ndim == 2
    y = network.run(x.unsqueeze(1) if single else x, h, weight, bias, task_ids, text)
    return y.squeeze(1) if single else y


def _layer_by_layer() -> bool:
    """Whether networks must run by the ops of their layers, which have rules for every transform,
    or by the reference."""
    return checks.is_transformed() or backends.forced == "reference"


def stored_mlp(
    x: Tensor,
    flat: Tensor,
    spec: MLPSpec,
    activations: Sequence[nn.Module | None],
    task_ids: Tensor | None,
    transform: Transform | None = None,
) -> Tensor:
    """Networks whose weights are given as ``flat (B, P)``, in one op where its kernels know all
    activations and the transform; else, and under transforms of ``torch.func``, layer by layer."""
    name = check_transform("weight_transform", transform)
    text = None if name is None else spec.describe(activations, name)
    x = _for_all(checks.check_tensor("x", x), len(flat), task_ids)
    if text is None or _layer_by_layer():
        views = iter(spec.split(flat))
        linears = [
            partial(
                task_linear,
                weight=transformed(transform, next(views)),
                bias=next(views) if has_bias else None,
                task_ids=task_ids,
            )
            for has_bias in spec.biases
        ]
        return run_layers(x, linears, activations)
    x, flat = checks.check_and_cast(x=x, weight=flat)
    checks.check_rows(x, spec.sizes[0], len(flat), task_ids, "weight")
    single = task_ids is None and x.ndim == 2
    y = task_mlp(x.unsqueeze(1) if single else x, flat, None, task_ids, text)
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


def _example(size: int) -> int:
    """A size that chooses between orders. In an export a dynamic one must not be bound to what the
    choice holds for: there it is that of the example, or 0 if it has none. (``torch.compile`` may
    choose again.)"""
    if not isinstance(size, torch.SymInt) or torch.compiler.is_dynamo_compiling():
        return size
    return int(size.node.hint) if size.node.has_hint() else 0


def _shared(x: Tensor, tasks: int, task_ids: Tensor | None) -> bool:
    """Whether the rows are ``(1, N, in)``, the same for all of several tasks."""
    return task_ids is None and x.ndim == 3 and x.shape[0] == 1 != tasks


def _for_all(x: Tensor, tasks: int, task_ids: Tensor | None) -> Tensor:
    """Shared rows for each of the tasks; others as they are."""
    return x.expand(tasks, -1, -1) if _shared(x, tasks, task_ids) else x


def _run(
    name: str,
    x: Tensor,
    tensors: tuple,
    task_ids: Tensor | None,
    options: tuple = (),
    *plan: str,
) -> Tensor:
    """Calls the op, or what :func:`hyperfast.use_backend` insists on; ``(B, in)`` is one row."""
    single = task_ids is None and x.ndim == 2
    if type(x) is not Tensor:
        sharding.prepare(x)
    if single:
        x = x.unsqueeze(1)
    if backends.forced == "reference":
        if not torch.compiler.is_compiling():
            checks.check_in_range(task_ids, tensors[0].shape[0])
        y = getattr(reference, name)(x, *tensors, task_ids, *options)
    else:
        if backends.forced is not None:
            backends.insist(backends.forced, name, x.device.type)
        y = getattr(layer, name)(x, *tensors, task_ids, *options, *plan)
    return y.squeeze(1) if single else y
