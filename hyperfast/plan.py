"""The choice of plan for a generated layer, and its explanation: pure functions of sizes.

A plan's time is modelled as a sum of what it does, each at a rate of its own: products begun, their
steps, entries of the head read, weights stored, rows applied, memory beyond the cache. The model
orders the plans; it does not predict seconds.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from hyperfast.model import HyperMLP

HAS_TRITON = importlib.util.find_spec("triton") is not None

PLANS = ("contract", "tile", "materialize")


class Layer(NamedTuple):
    """The sizes of one generated layer: ``rows`` in all, spread over ``tasks``."""

    tasks: int
    rows: int
    in_features: int
    out_features: int
    features: int
    ragged: bool = False
    bias: bool = True

    @property
    def params(self) -> int:
        return self.out_features * (self.in_features + self.bias)


class Device(NamedTuple):
    """What plain PyTorch reaches: FLOP/s, and bytes/s on new memory."""

    flops: float
    bandwidth: float


DEVICES = {"cpu": Device(2e11, 1e10), "cuda": Device(4e14, 3e12)}


class Work(NamedTuple):
    """How much of each thing a plan does; or how many seconds one of each takes."""

    calls: float = 0  # one
    products: float = 0  # begun: one a block or, in C++, one an entry of the weight's longer side
    head: float = 0  # entries of the head's weight, as often as they are read
    steps: float = 0  # of these products over all tasks and features, in C++
    outputs: float = 0  # of one row of every task
    generated: float = 0  # multiply-adds with features
    stored: float = 0  # entries of temporaries
    applied: float = 0  # multiply-adds of rows with weights
    spilled: float = 0  # bytes of temporaries that memory is mapped anew for

    def seconds(self, rates: Work) -> float:
        return sum(a * b for a, b in zip(self, rates, strict=True))


# Elements of the temporaries of one block: 1 MB in fp32, half of a usual L2 cache.
BLOCK = 1 << 18

# Bytes from which on a temporary is mapped anew in every call: malloc's most, and what C++ keeps.
MAPPED = {"cpu": 32 << 20, "cpp": 8 << 20}

# Seconds of one of each, by device and plan: "cpu" is plain PyTorch, "cpp" the C++ kernels. Fitted
# by `python -m hyperfast bench --calibrate`: fp32, 2 cores of an Intel Xeon, family 6 model 167.
RATES: dict[str, dict[str, Work]] = {
    "cpu": {
        "contract": Work(2.64e-05, 1.06e-05, 8.55e-11, 0, 0, 4.58e-12, 3.18e-10, 0, 0),
        "tile": Work(2.16e-05, 2.49e-06, 2.07e-10, 0, 3.29e-09, 6.34e-12, 1.45e-10, 2.47e-11, 0),
        "materialize": Work(
            6.11e-06, 8.06e-06, 5.49e-11, 0, 1.23e-09, 4.26e-12, 1.85e-10, 1.26e-11, 1.78e-10
        ),
    },
    "cpp": {
        "tile": Work(
            7.33e-06, 5.08e-08, 4.18e-10, 3.17e-11, 1.02e-09, 4.99e-12, 1.45e-10, 1.47e-11, 0
        ),
        "materialize": Work(
            8.32e-06, 4.44e-08, 6.56e-11, 7.36e-11, 1.33e-08, 3.78e-12, 4.34e-11, 1.6e-11, 7.29e-11
        ),
    },
}

# A GPU without fused kernels, or any other device, guessed: 400 TFLOP/s, 3 TB/s, 10 us a block.
UNKNOWN = Work(products=1e-5, generated=5e-15, applied=5e-15, spilled=7e-13)


class Gpu(NamedTuple):
    """What the fused kernel and a library's matrix product reach in one kind of arithmetic: FLOP/s.
    An H200's peaks by its data sheet, of which a fused kernel is taken to reach half and a library
    three quarters. The figures order the plans; they are not measured."""

    fused: float
    library: float


GPU = {
    "half": Gpu(495e12, 740e12),
    "tf32": Gpu(245e12, 370e12),
    "fp32": Gpu(33e12, 50e12),
    "fp64": Gpu(33e12, 50e12),
}
GPU_MEMORY, GPU_CACHE = 4.8e12, 7e12  # bytes/s
GPU_LAUNCH = 3e-6  # seconds
GPU_BLOCK = 32 << 20  # bytes of generated weights at a time: about half of the last-level cache


@dataclass(frozen=True)
class Cost:
    """What one plan takes for one layer, forward."""

    plan: str
    flops: int
    bytes: int
    extra_bytes: int
    seconds: float


def work(layer: Layer, itemsize: int, device: str) -> dict[str, Work]:
    """What every plan does, by name, where no fused GPU kernels run. In C++ ``contract`` is another
    name of ``tile``, and left out."""
    b, r, i, o, k, ragged, _ = layer
    p, longer = layer.params, max(i, o)
    if device == "cpp":
        whole = Work(1, longer, p * k, b * longer * k, b * o, b * p * k, b * p, r * p)
        table = {"tile": whole, "materialize": whole}
    else:
        pairs = r * min(i * k, o * k, i * o)  # see eager._trilinear
        weights = b * p + ragged * r * p  # mixed rows gather theirs, a copy each
        cuts = {name: max(-(-n // BLOCK), 1) for name, n in (("r", pairs), ("b", b * p))}
        table = {
            "contract": Work(1, cuts["r"], cuts["r"] * p * k, 0, 0, r * p * k, pairs, 0),
            "tile": Work(1, cuts["b"], cuts["b"] * p * k, 0, b * o, b * p * k, weights, r * p),
            "materialize": Work(1, 1, p * k, 0, b * o, b * p * k, weights, r * p),
        }
    whole = table["materialize"]
    if whole.stored * itemsize > MAPPED.get(device, 0):
        table["materialize"] = whole._replace(spilled=whole.stored * itemsize)
    return table


@lru_cache(maxsize=4096)
def costs(layer: Layer, itemsize: int, device: str = "cpu") -> dict[str, Cost]:
    """The cost of every plan of :func:`work`, by name; ``device`` is a :func:`device_key`."""
    if device in GPU:
        return _gpu_costs(layer, itemsize, GPU[device])
    io = layer.tasks * layer.features + layer.rows * (layer.in_features + layer.out_features)
    result = {}
    for name, amounts in work(layer, itemsize, device).items():
        rates = RATES[device][name] if device in RATES else UNKNOWN
        extra = amounts.stored if name == "materialize" else min(amounts.stored, BLOCK)
        result[name] = Cost(
            name,
            flops=int(2 * (amounts.generated + amounts.applied)),
            bytes=int((io + amounts.head) * itemsize + 2 * amounts.spilled),
            extra_bytes=int(extra * itemsize),
            seconds=amounts.seconds(rates),
        )
    return result


def _gpu_costs(layer: Layer, itemsize: int, gpu: Gpu) -> dict[str, Cost]:
    """Where fused kernels run: ``contract`` stores nothing; ``tile`` writes and reads the weights
    in cache, a block at a time; ``materialize`` in memory, unless they fit."""
    b, r, i, o, k, ragged, _ = layer
    p = layer.params
    io = (p * k + b * k + r * (i + o)) * itemsize
    weights = b * p * itemsize
    generated = 2 * b * p * k + 2 * r * p
    blocks = max(-(-weights // GPU_BLOCK), 1)
    memory = GPU_MEMORY if blocks > 1 else GPU_CACHE
    # FLOPs at a rate, weights stored, bytes of them moved at a rate, launches. Mixed rows would
    # have to be cut into blocks of tasks by the host, which does not see the ids: never tile.
    table = {
        "contract": (2 * r * p * k, gpu.fused, 0, 0, memory, 1),
        "tile": (generated, gpu.library, min(weights, GPU_BLOCK), 2 * weights, GPU_CACHE,
                 2 * blocks),
        "materialize": (generated, gpu.library, weights, 2 * weights, memory, 2),
    }  # fmt: skip
    return {
        name: Cost(
            name,
            flops,
            io + min(moved, 2 * stored),
            stored,
            math.inf
            if ragged and name == "tile"
            else flops / rate + moved / bandwidth + launches * GPU_LAUNCH,
        )
        for name, (flops, rate, stored, moved, bandwidth, launches) in table.items()
    }


def arithmetic(dtype: torch.dtype) -> str:
    """The kind of arithmetic, a key of :data:`GPU`: fp32 is TF32 where PyTorch's products are."""
    if dtype == torch.float64:
        return "fp64"
    if dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"
    return "half"


def device_key(device: str, dtype: torch.dtype) -> str:
    """What the choice of plan depends on besides sizes: a key of :data:`RATES`, or of
    :data:`GPU` where fused kernels run."""
    if device == "cuda" and HAS_TRITON:
        return arithmetic(dtype)
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key("hyperfast::hyper_linear", "CPU")
    return "cpp" if device == "cpu" and compiled else device


@lru_cache(maxsize=4096)
def choose(layer: Layer, itemsize: int, device: str = "cpu") -> str:
    """The name of the plan that runs: the one of least cost."""
    return min(costs(layer, itemsize, device).values(), key=lambda c: c.seconds).plan


# Bytes of a hidden layer: above the first, it is computed a block of about the second at a time,
# so that it stays in the second-level cache until the next layer has read it.
HIDDEN_MOST, HIDDEN_BLOCK = 8 << 20, 2 << 20


def task_blocks(tasks: int, rows: int, widest: int, itemsize: int) -> list[slice]:
    """The blocks of tasks in which a network of so many rows a task runs where nothing between its
    layers is kept; a single one where the widest layer is small."""
    hidden = rows * widest * itemsize
    if tasks * hidden <= HIDDEN_MOST:
        return [slice(0, tasks)]
    step = max(HIDDEN_BLOCK // hidden, 1)
    return [slice(b, min(b + step, tasks)) for b in range(0, tasks, step)]


@dataclass(frozen=True)
class Explanation:
    """The plan of every layer of a model, forward; ``print`` shows it as a table."""

    title: str
    layers: tuple[tuple[str, Cost], ...]

    def __str__(self) -> str:
        head = f"{'layer':>12} {'plan':<12} {'MFLOP':>10} {'MB moved':>10} {'MB extra':>10}"
        rows = [(name, c.plan, c.flops, c.bytes, c.extra_bytes) for name, c in self.layers]
        rows.append(
            ("total", "", sum(r[2] for r in rows), sum(r[3] for r in rows), max(r[4] for r in rows))
        )
        lines = [
            f"{name:>12} {plan:<12} {f / 1e6:>10.3f} {b / 1e6:>10.3f} {e / 1e6:>10.3f}"
            for name, plan, f, b, e in rows
        ]
        return "\n".join([self.title, head, *lines])

    __repr__ = __str__


def explain(
    model: HyperMLP, x_shape: Sequence[int], z_shape: Sequence[int], *, ragged: bool = False
) -> Explanation:
    """The plan chosen for every layer of ``model``, its FLOPs, bytes and extra memory.

    In the way of ``numpy.einsum_path``: nothing runs. FLOPs and bytes are those of one forward
    pass without the trunk; extra memory is what is neither input, parameter nor output.

    Args:
        model: a :class:`hyperfast.HyperMLP`.
        x_shape: ``(B, N, in)`` or ``(B, in)``, or ``(R, in)`` with ``ragged``.
        z_shape: ``(B, z_dim)``.
        ragged: whether rows name their tasks by ``task_ids``.

    Raises:
        TypeError: the model is not one whose layers are generated and applied in one op each.
        ValueError: shapes that do not fit the model or each other.
    """
    mlp = getattr(model, "mlp", None)
    if mlp is None:
        raise TypeError("model must be a HyperMLP whose target is a TargetNet without transform")
    spec, hyper = mlp[0], model.hyper
    x_shape, z_shape = tuple(x_shape), tuple(z_shape)
    if len(z_shape) != 2 or z_shape[1] != hyper.z_dim:
        raise ValueError(f"z_shape must be (B, {hyper.z_dim}), got {z_shape}")
    fits = len(x_shape) == 2 if ragged else len(x_shape) in (2, 3) and x_shape[0] == z_shape[0]
    if not fits or x_shape[-1] != spec.sizes[0]:
        b, i = z_shape[0], spec.sizes[0]
        want = f"(R, {i})" if ragged else f"({b}, N, {i}) or ({b}, {i})"
        raise ValueError(f"x_shape must be {want}, got {x_shape}")
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    weight = hyper.head.weight
    device = device_key(weight.device.type, weight.dtype)
    explained = []
    for layer in spec.layers:
        i, o = layer.in_features, layer.out_features
        sizes = Layer(z_shape[0], rows, i, o, hyper.head.in_features, ragged, layer.bias)
        table = costs(sizes, weight.element_size(), device)
        name = choose(sizes, weight.element_size(), device)
        explained.append((f"{i} -> {o}", table[name]))
    title = f"x {x_shape}, z {z_shape}, {str(weight.dtype).removeprefix('torch.')}"
    return Explanation(f"{title} on {weight.device.type}", tuple(explained))
