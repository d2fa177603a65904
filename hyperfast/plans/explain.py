"""The plans of a model, as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hyperfast.layout import at_least
from hyperfast.plans import cpu, gpu, orders
from hyperfast.plans.choose import choose, costs, device_key
from hyperfast.plans.sizes import Cost, Sizes


@dataclass(frozen=True)
class Explanation:
    """The plan of every layer of a model, forward; ``print`` shows it as a table.

    ``whole`` says that the layers of a task run together, on weights that are made for a block of
    tasks at a time: their extra memory is there at once.
    """

    title: str
    layers: tuple[tuple[str, Cost], ...]
    whole: bool = False

    def __str__(self) -> str:
        head = f"{'layer':>12} {'plan':<12} {'MFLOP':>10} {'MB moved':>10} {'MB extra':>10}"
        rows = [(name, c.plan, c.flops, c.bytes, c.extra_bytes) for name, c in self.layers]
        flops, moved, extra = zip(*(r[2:] for r in rows), strict=True)
        rows.append(("total", "", sum(flops), sum(moved), (sum if self.whole else max)(extra)))
        lines = [
            f"{name:>12} {plan:<12} {f / 1e6:>10.3f} {b / 1e6:>10.3f} {e / 1e6:>10.3f}"
            for name, plan, f, b, e in rows
        ]
        return "\n".join([self.title, head, *lines])

    __repr__ = __str__


def explain(
    model: Any,
    x_shape: Sequence[int],
    z_shape: Sequence[int],
    *,
    ragged: bool = False,
    dim_size: int | None = None,
) -> Explanation:
    """The plan chosen for every layer of ``model``, its FLOPs, bytes and extra memory.

    In the way of ``numpy.einsum_path``: nothing runs. FLOPs and bytes are those of one forward
    pass without the trunk; extra memory is what is neither input, parameter nor output. The plan
    ``whole`` is that of the C++ kernels for many rows a task and for few tasks: all layers of a
    task together, on weights made for a block of tasks at a time. ``destinations`` sums rows before
    they meet the head, ``project`` multiplies rows that all tasks share with the head first
    (:mod:`hyperfast.plans.orders`). ``bf16x6``, ``bf16x3`` or ``bf16x1`` says that a GPU's matrix
    units multiply fp32 numbers in three, two or one parts of bf16.

    Args:
        model: a :class:`hyperfast.HyperMLP`, or a :class:`hyperfast.HyperLinear`.
        x_shape: ``(B, N, in)``, ``(1, N, in)``, ``(B, in)``, or ``(R, in)`` with ``ragged``.
        z_shape: ``(B, z_dim)``; of a HyperLinear the features ``(B, K)``.
        ragged: whether rows name their tasks by ``task_ids``.
        dim_size: how many destinations the rows of a HyperLinear are summed into.

    Raises:
        TypeError: the model is not one whose layers are generated and applied without forming the
            weights, or a shape is none.
        ValueError: shapes that do not fit the model or each other.

    Example:
        >>> model = hyperfast.HyperMLP(hyperfast.HyperNet(16, 2, (32, 32), 1))
        >>> print(hyperfast.explain(model, (1000, 64, 2), (1000, 16)))
        x (1000, 64, 2), z (1000, 16), float32 on ...
               layer plan              MFLOP   MB moved   MB extra
             2 -> 32 ...
    """
    mlp: Any = getattr(model, "mlp", None)
    if mlp is not None:
        heads, linear, transform = model.hyper.layers, mlp.heads[0], mlp.transform
        z_dim = model.hyper.z_dim
    elif (layer := getattr(model, "layer", None)) is not None:
        heads, linear, transform = [layer], model.head, layer.transform
        z_dim = linear.in_features
    else:
        came = type(model).__name__
        if (hyper := getattr(model, "hyper", None)) is not None:
            why = "its weights are chunked" if hyper.chunk_dim else "a part of it is not plain"
            came = f"one that forms them, as {why}: {came}"
        raise TypeError(
            f"model must be a HyperMLP that does not form the weights, or a HyperLinear, got {came}"
        )
    x_shape, z_shape = _shape("x_shape", x_shape), _shape("z_shape", z_shape)
    if len(z_shape) != 2 or z_shape[1] != z_dim:
        raise ValueError(f"z_shape must be (B, {z_dim}), got {z_shape}")
    if dim_size is not None:
        at_least("dim_size", dim_size, 0)
    (tasks, _), ins = z_shape, heads[0].in_features
    shared = not ragged and len(x_shape) == 3 and x_shape[0] == 1 != tasks
    fits = len(x_shape) == 2 if ragged else len(x_shape) in (2, 3) and x_shape[0] == tasks
    if not (fits or shared) or x_shape[-1] != ins:
        want = f"(R, {ins})" if ragged else f"({tasks}, N, {ins}) or ({tasks}, {ins})"
        raise ValueError(f"x_shape must be {want}, got {x_shape}")
    rows, weight = math.prod(x_shape[:-1]) * (tasks if shared else 1), linear.weight
    features = weight.shape[1]
    device, dtype = device_key(weight.device.type, weight.dtype), weight.dtype
    layers = tuple(
        size for v in heads for size in v.sizes(tasks, rows, features, ragged, bool(transform))
    )
    title = f"x {x_shape}, z {z_shape}, {str(dtype).removeprefix('torch.')} on {weight.device.type}"
    whole, one_kernel, network = False, False, None
    if mlp is not None and mlp.whole:
        names = mlp.target.layer_activations(len(layers))
        network = mlp.spec.describe(names, mlp.transform)
    elif mlp is None and dim_size is None and not shared:
        network = heads[0].network
    if network is not None:
        if device in gpu.GPU:
            one_kernel = gpu.one_kernel(layers, dtype.itemsize, device)
            title += ", in one kernel" * one_kernel
        elif device == "cpp":
            whole = cpu.runs_whole(network, dtype, ragged, tasks, rows, features)
    chosen = []
    for n, v in enumerate(layers):
        last = n + 1 == len(layers)
        cost = None
        if whole:
            total = sum(layer.params for layer in layers)
            cost = _whole(v, total, dtype.itemsize, costs(v, dtype, device)["materialize"])
        elif dim_size is not None and last:
            cost = orders.destinations(v, dim_size, dtype.itemsize)
        if cost is None and shared and n == 0 and (mlp is None or not mlp.whole):
            cost = orders.project(v, dtype.itemsize)
        plan = "materialize" if callable(transform) else choose(v, dtype, device)
        cost = cost or costs(v, dtype, device)[plan]
        chosen.append((f"{v.in_features} -> {v.out_features}", cost))
    if device in gpu.GPU:
        contracted = [[v] for v, (_, c) in zip(layers, chosen, strict=True) if c.plan == "contract"]
        ways = {gpu.split(v, device) or "" for v in ([layers] if one_kernel else contracted)}
        title += "".join(f", {way}" for way in sorted(ways) if way)
    return Explanation(title, tuple(chosen), whole)


def _shape(name: str, value: Sequence[int]) -> tuple[int, ...]:
    """``value`` as a tuple; raises TypeError or ValueError naming ``name``."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a shape, as x.shape is, got {type(value).__name__}")
    return tuple(at_least(name, n, 0) for n in value)


def _whole(layer: Sizes, params: int, itemsize: int, cost: Cost) -> Cost:
    """One layer of networks of ``params`` numbers that run whole: its weights in one block."""
    assert cpu.EXTENSION is not None
    block = min(layer.tasks * params * max(itemsize, 4), cpu.EXTENSION.NETWORKS_BYTES)
    share = block * layer.params // params
    return Cost("whole", cost.flops, cost.bytes, share, cost.seconds)
