"""The choice of plan for a generated layer, and its explanation: pure functions of sizes.

A plan's time is modelled as a sum of what it does, each at a rate of its own: products begun, their
steps, entries of the head read, weights stored, rows applied, memory beyond the cache. The model
orders the plans; it does not predict seconds.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from hyperfast.nn.model import HyperMLP

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
    products: float = 0  # begun, one a block
    head: float = 0  # entries of the head's weight, as often as they are read
    outputs: float = 0  # of one row of every task
    generated: float = 0  # multiply-adds with features
    stored: float = 0  # entries of temporaries
    applied: float = 0  # multiply-adds of rows with weights
    spilled: float = 0  # bytes of temporaries that memory is mapped anew for

    def seconds(self, rates: Work) -> float:
        return sum(a * b for a, b in zip(self, rates, strict=True))


# Elements of the temporaries of one block: 1 MB in fp32, half of a usual L2 cache.
BLOCK = 1 << 18

# Bytes from which on a temporary is mapped anew in every call: malloc's most.
MAPPED = {"cpu": 32 << 20}

# Seconds of one of each, by device and plan, where plain PyTorch runs. Fitted by
# `python -m hyperfast bench --calibrate`: fp32, 2 cores of an Intel Xeon, family 6 model 167.
RATES: dict[str, dict[str, Work]] = {
    "cpu": {
        "contract": Work(2.64e-05, 1.06e-05, 8.55e-11, 0, 4.58e-12, 3.18e-10, 0, 0),
        "tile": Work(2.16e-05, 2.49e-06, 2.07e-10, 3.29e-09, 6.34e-12, 1.45e-10, 2.47e-11, 0),
        "materialize": Work(
            6.11e-06, 8.06e-06, 5.49e-11, 1.23e-09, 4.26e-12, 1.85e-10, 1.26e-11, 1.78e-10
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

# One kernel runs a whole network of layers up to this width. Inputs and sums of a row are in
# registers at once; those of 128 spill on sm_80 and gfx942, in TF32 on sm_90 too. Little is lost:
# of W * W * K multiply-adds and 4 * W bytes a row and layer, it saves the bytes, at 128 about 1%.
GPU_WIDEST = 64
GPU_DEEPEST = 4  # layers: each is compiled for itself, a second or more
GPU_ROWS = 64  # of its smallest tile; 32 where products run on matrix units
GPU_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Cost:
    """What one plan takes for one layer, forward."""

    plan: str
    flops: int
    bytes: int
    extra_bytes: int
    seconds: float


def work(layer: Layer, itemsize: int, device: str) -> dict[str, Work]:
    """What every plan does, by name, where no fused GPU kernels run."""
    b, r, i, o, k, ragged, _ = layer
    p = layer.params
    if device == "cpp":  # blocks of 64 tasks, or of as many rows as name their tasks
        units = r if ragged else b
        generated = Work(1, 1, p * k, b * o, b * p * k, b * p, r * p)
        reads = max(-(-units // 64), 1)
        contract = Work(1, reads, reads * p * k, b * o, units * p * k, 0, r * p)
        return {"contract": contract, "tile": generated, "materialize": generated}
    pairs = r * min(i * k, o * k, i * o)  # see eager._trilinear
    weights = b * p + ragged * r * p  # mixed rows gather theirs, a copy each
    cuts = {name: max(-(-n // BLOCK), 1) for name, n in (("r", pairs), ("b", b * p))}
    whole = Work(1, 1, p * k, b * o, b * p * k, weights, r * p)
    if weights * itemsize > MAPPED.get(device, 0):
        whole = whole._replace(spilled=weights * itemsize)
    return {
        "contract": Work(1, cuts["r"], cuts["r"] * p * k, 0, r * p * k, pairs, 0),
        "tile": Work(1, cuts["b"], cuts["b"] * p * k, b * o, b * p * k, weights, r * p),
        "materialize": whole,
    }


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


def loop(layer: Layer, first: bool) -> str:
    """What the kernel of a whole network loops over in one layer: ``"feature"``, ``"input"`` or
    ``"output"``; it multiplies along one of the other two. By steps, times the sizes of a product
    and what goes with it; only the ``first`` layer's inputs lie in memory."""
    i, o = (max(16, 1 << (n - 1).bit_length()) for n in (layer.in_features, layer.out_features))
    blocks = -(-layer.features // 64)
    work = {
        "feature": layer.features * (i + 16) * o,
        "input": layer.in_features * blocks * (64 + 16) * o if first else math.inf,
        "output": layer.out_features * blocks * (i + 32) * 64,
    }
    return min(work, key=lambda name: work[name])


def fits_one_kernel(sizes: Sequence[int]) -> bool:
    """Whether one kernel can run a network of these widths on a GPU."""
    return max(sizes) <= GPU_WIDEST and len(sizes) - 1 <= GPU_DEEPEST


@lru_cache(maxsize=4096)
def one_kernel(layers: tuple[Layer, ...], itemsize: int, device: str) -> bool:
    """Whether one kernel runs the layers of a network: it stores nothing between them, but is one
    program a block of rows, where a layer's kernel cuts its outputs too. ``device`` is a key of
    :data:`GPU`."""
    widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
    rows = layers[0].rows
    if not fits_one_kernel(widths) or not rows:
        return False
    tables = [costs(layer, itemsize, device) for layer in layers]
    copied = any(loop(layer, n == 0) == "feature" for n, layer in enumerate(layers))
    fill = min(rows / (GPU_ROWS * GPU_MULTIPROCESSORS), 1)
    whole = sum(table["contract"].flops for table in tables) / GPU[device].fused / fill
    apart = sum(min(c.seconds for c in table.values()) for table in tables)
    apart += 2 * rows * sum(widths[1:-1]) * itemsize / GPU_MEMORY
    return whole + (1 + copied) * GPU_LAUNCH < apart


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


# Where the C++ kernels take few tasks, and many rows of a task, otherwise than the rest.
# A task of more than so many rows counts as several.
FEW_TASKS, MANY_ROWS, LARGE_NETWORK, CUT_ROWS = 4, 48, 256 << 10, 2048


def _cpp_plan(layer: Layer, itemsize: int) -> str:
    """The rule of the C++ kernels: csrc/groups.cpp says why, and measurement
    (``python -m hyperfast bench --calibrate``) how well. Mixed rows are taken to name as many tasks
    as they can."""
    tasks, rows, params = layer.tasks, layer.rows, layer.params
    if layer.ragged:
        tasks = min(tasks, rows)
    elif tasks:
        tasks *= max(-(-rows // (tasks * CUT_ROWS)), 1)
    if tasks <= FEW_TASKS:
        return "tile" if tasks > 1 and params * layer.features < 8192 else "materialize"
    many = rows >= MANY_ROWS * tasks
    if tasks <= 16 and params >= (512 if many else 1024):
        return "materialize"
    if many and tasks <= 64 and params >= 1024:
        return "materialize"
    few = 4 * rows <= 5 * tasks if layer.ragged else rows <= 8 * tasks
    units = rows if layer.ragged else tasks
    unit = _has_matrix_unit() and layer.features >= 32 and units * params >= 1 << 17
    return "contract" if few and (itemsize >= 4 or unit) else "tile"


def _has_matrix_unit() -> bool:
    """Whether the loaded kernels use one; to load them here would register them."""
    kernels = sys.modules.get("hyperfast._C")
    return kernels is not None and kernels.isa() == "amx"


def recomputes(tasks: int, rows: int, params: int, features: int, itemsize: int) -> bool:
    """Whether the backward pass of a network computes its pre-activations again, rather than the
    forward pass keeping them: with many rows a task that takes less than to write them to new
    memory (SIREN 2-64-64-1, 4,096 rows a task: 2 ms against 8 ms), unless to generate the weights
    again takes longer than to apply them. Larger networks run layer by layer, and would generate
    all weights again."""
    many = rows >= max(MANY_ROWS, features) * tasks
    return many and params * max(itemsize, 4) <= LARGE_NETWORK


@lru_cache(maxsize=4096)
def choose(layer: Layer, itemsize: int, device: str = "cpu") -> str:
    """The name of the plan that runs: the one of least cost, and in C++ that of a simple rule."""
    if device == "cpp":
        return _cpp_plan(layer, itemsize)
    return min(costs(layer, itemsize, device).values(), key=lambda c: c.seconds).plan


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
    explained, layers = [], []
    for layer in spec.layers:
        i, o = layer.in_features, layer.out_features
        sizes = Layer(z_shape[0], rows, i, o, hyper.head.in_features, ragged, layer.bias)
        layers.append(sizes)
        table = costs(sizes, weight.element_size(), device)
        name = choose(sizes, weight.element_size(), device)
        explained.append((f"{i} -> {o}", table[name]))
    title = f"x {x_shape}, z {z_shape}, {str(weight.dtype).removeprefix('torch.')}"
    title += f" on {weight.device.type}"
    if device in GPU and one_kernel(tuple(layers), weight.element_size(), device):
        title += ", in one kernel"
    return Explanation(title, tuple(explained))
