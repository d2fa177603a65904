"""What the Triton kernels reach, and what one kernel can run. Our kernels have not been measured on
a GPU yet; ``bench/gpu/gpu.sh`` does so, and prints the figures to put here."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from hyperfast.plans.sizes import Cost, Sizes

HAS_TRITON = importlib.util.find_spec("triton") is not None


class Gpu(NamedTuple):
    """What the fused kernel and a library's matrix product reach in one kind of arithmetic: FLOP/s.
    An H200's peaks by its data sheet, of which a fused kernel is taken to reach half and a library
    three quarters. The figures order the plans; they are not measured."""

    fused: float
    library: float


# fp32 numbers are multiplied in parts of bf16, by our kernels: six products of three parts are no
# less accurate than fp32; "high" may treat a number as the sum of two bf16, "medium" as one.
SPLIT = {"fp32": "bf16x6", "high": "bf16x3", "medium": "bf16x1"}
PARTS = {"bf16x6": 3, "bf16x3": 2, "bf16x1": 1}

# A library's fp32 products are TF32 where PyTorch's precision is not the highest.
GPU = {
    "half": Gpu(495e12, 740e12),
    "fp32": Gpu(495e12 / 6, 50e12),
    "high": Gpu(495e12 / 3, 370e12),
    "medium": Gpu(495e12, 370e12),
    "fp64": Gpu(33e12, 50e12),
}
# FLOP/s of the fused kernel where numbers are not split, as GPU's: of vector units, and of TF32.
UNSPLIT = {"fp32": 33e12, "high": 245e12, "medium": 245e12}


class Machine(NamedTuple):
    """What a device and its host reach: bytes/s read and written by a copy, and seconds of the host
    to launch a kernel eagerly. Triton's launches of 19 arguments take 12 us, ours have more: with
    what PyTorch adds, 12 to 25 us."""

    memory: float
    launch: float


# By a part of the device's name. Copies as others measured them.
MACHINES = {"H100": Machine(3.0e12, 12e-6), "H200": Machine(4.3e12, 12e-6)}


def machine() -> Machine:
    """Of the current device; an H100's where there is none, or an unknown one."""
    if not torch.cuda.is_available():
        return MACHINES["H100"]
    return _machine(torch.cuda.current_device())


@lru_cache
def _machine(device: int) -> Machine:
    name = torch.cuda.get_device_name(device)
    return next((m for key, m in MACHINES.items() if key in name), MACHINES["H100"])


GPU_CACHE = 5.5e12  # bytes/s
GPU_SORT = 4e-5  # seconds to sort some thousand rows by their task: about seven launches
GPU_BLOCK = 32 << 20  # bytes of generated weights at a time: about half of the last-level cache

# One kernel runs a whole network of layers up to this width. Inputs and sums of a row are in
# registers at once; those of 128 spill on sm_80 and gfx942, in TF32 on sm_90 too. Little is lost:
# of W * W * K multiply-adds and 4 * W bytes a row and layer, it saves the bytes, at 128 about 1%.
GPU_WIDEST = 64
GPU_DEEPEST = 4  # layers: each is compiled for itself, a second or more
GPU_ROWS = 64  # of its smallest tile; 32 where products run on matrix units
GPU_MULTIPROCESSORS = 132


def costs(layer: Sizes, itemsize: int, device: str) -> dict[str, Cost]:
    """Where fused kernels run: ``contract`` stores nothing; ``tile`` writes and reads the weights
    in cache, a block at a time; ``materialize`` in memory, unless they fit.
    ``device`` is a key of :data:`GPU`. ``contract`` knows no transform."""
    return _costs(layer, itemsize, device, machine())


@lru_cache(maxsize=4096)
def _costs(layer: Sizes, itemsize: int, device: str, machine: Machine) -> dict[str, Cost]:
    b, r, i, o, k, ragged, _, transform = layer
    if transform and ragged and r < b:  # fewer rows than tasks are tasks of their own
        b, ragged = r, False
    p = layer.params
    io = (p * k + b * k + r * (i + o)) * itemsize
    library = GPU[device].library
    weights = b * p * itemsize
    generated = 2 * b * p * k + 2 * r * p
    blocks = max(-(-weights // GPU_BLOCK), 1)
    memory = machine.memory if blocks > 1 else GPU_CACHE
    name, products, splitting = _products(device, *_in_all([layer]), machine)
    parts = 0 if transform else 2 * PARTS.get(name, 0) * (p + b) * k
    # FLOPs and their seconds, bytes stored, bytes of them moved at a rate, launches. Mixed rows
    # would have to be cut into blocks of tasks by the host, which does not see the ids: never tile.
    table = {
        "contract": (2 * r * p * k, products + splitting, parts, 2 * parts, math.inf, 1),
        "tile": (generated, generated / library, min(weights, GPU_BLOCK), 2 * weights, GPU_CACHE,
                 3 * blocks),
        "materialize": (generated, generated / library, weights, 2 * weights, memory, 2),
    }  # fmt: skip
    never = {"tile"} if ragged else set()
    if transform:
        never.add("contract")
    return {
        name: Cost(
            name,
            flops,
            io + min(moved, 2 * stored),
            stored,
            math.inf if name in never else seconds + moved / bandwidth + launches * machine.launch,
        )
        for name, (flops, seconds, stored, moved, bandwidth, launches) in table.items()
    }


def sorting_pays(reads: int) -> bool:
    """Whether to sort mixed rows by their task saves more than it takes, if each reads its task's
    weights, ``reads`` bytes in all: of a task that others have read, from the cache."""
    return reads > GPU_SORT * GPU_CACHE


def fits_one_kernel(sizes: Sequence[int]) -> bool:
    """Whether one kernel can run a network of these widths on a GPU."""
    return max(sizes) <= GPU_WIDEST and len(sizes) - 1 <= GPU_DEEPEST


def one_kernel(layers: tuple[Sizes, ...], itemsize: int, device: str) -> bool:
    """Whether one kernel runs the layers of a network: it stores nothing between them, but is one
    program a block of rows, where a layer's kernel cuts its outputs too. It makes no weight that
    could be transformed. ``device`` is a key of :data:`GPU`."""
    return _one_kernel(layers, itemsize, device, machine())


@lru_cache(maxsize=4096)
def _one_kernel(layers: tuple[Sizes, ...], itemsize: int, device: str, machine: Machine) -> bool:
    widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
    rows = layers[0].rows
    if not fits_one_kernel(widths) or not rows or any(layer.transform for layer in layers):
        return False
    tables = [_costs(layer, itemsize, device, machine) for layer in layers]
    fill = min(rows / (GPU_ROWS * GPU_MULTIPROCESSORS), 1)
    _, products, splitting = _products(device, *_in_all(layers), machine)
    whole = products / fill + splitting
    apart = sum(min(c.seconds for c in table.values()) for table in tables)
    apart += 2 * rows * sum(widths[1:-1]) * itemsize / machine.memory
    return whole + machine.launch < apart


def split(layers: Sequence[Sizes], device: str) -> str | None:
    """The parts in which a kernel multiplies, a key of :data:`PARTS`, if it does so in parts."""
    name = _products(device, *_in_all(layers), machine())[0]
    return name if name in PARTS else None


def _in_all(layers: Sequence[Sizes]) -> tuple[int, int]:
    """FLOPs of what one kernel runs, and the numbers that it multiplies."""
    params, features = sum(layer.params for layer in layers), layers[0].features
    return 2 * layers[0].rows * params * features, (params + layers[0].tasks) * features


def arithmetic(dtype: torch.dtype) -> str:
    """The kind of arithmetic, a key of :data:`GPU`: of fp32 as CUDA's products are set, and
    ``medium`` where :func:`torch.set_float32_matmul_precision` asked for that."""
    if dtype == torch.float64:
        return "fp64"
    if dtype != torch.float32:
        return "half"
    backends: Any = torch.backends
    if backends.cuda.matmul.fp32_precision != "tf32":
        return "fp32"
    try:
        medium = backends.mkldnn.matmul.fp32_precision == "bf16"
        medium = medium and torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:  # each backend was set for itself
        medium = False
    return "medium" if medium else "high"


def unit(dtype: torch.dtype) -> str:
    """What multiplies numbers that are not split: of fp32, TF32 where PyTorch's products are."""
    return _unit(arithmetic(dtype))


def _unit(kind: str) -> str:
    return "tf32" if kind in ("high", "medium") else kind


def products(dtype: torch.dtype, flops: int, numbers: int) -> str:
    """How a fused kernel multiplies: by a :func:`unit`, or in parts, a key of :data:`PARTS`;
    operands of ``numbers`` elements would be split for so many ``flops``."""
    kind = arithmetic(dtype)
    return _products(kind, flops, numbers, machine())[0] if kind in SPLIT else kind


def _products(kind: str, flops: int, numbers: int, machine: Machine) -> tuple[str, float, float]:
    """What takes less, its seconds, and those of splitting: two launches, which read 4 bytes of a
    number and write 2 of each part. None of it is measured."""
    seconds = flops / GPU[kind].fused
    if (name := SPLIT.get(kind)) is None:
        return kind, seconds, 0.0
    splitting = numbers * (4 + 2 * PARTS[name]) / machine.memory + 2 * machine.launch
    unsplit = flops / UNSPLIT[kind]
    # Two parts keep 16 bits of a number, TF32 keeps 11: they may take twice as long.
    if seconds + splitting < unsplit * (2 if kind == "high" else 1):
        return name, seconds, splitting
    return _unit(kind), unsplit, 0.0
