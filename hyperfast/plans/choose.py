"""The choice of plan for a generated layer: a pure function of sizes.

Where plain PyTorch runs, a plan's time is modelled as a sum of what it does, each at a rate of its
own: products begun, their steps, entries of the head read, weights stored, rows applied, memory
beyond the cache. The model orders the plans; it does not predict seconds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from hyperfast.plans import cpu, gpu
from hyperfast.plans.sizes import BLOCK, Cost, Sizes, Work


class Device(NamedTuple):
    """What plain PyTorch reaches: FLOP/s, and bytes/s on new memory."""

    flops: float
    bandwidth: float


DEVICES = {"cpu": Device(2e11, 1e10), "cuda": Device(4e14, 3e12)}


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


def work(layer: Sizes, itemsize: int, device: str) -> dict[str, Work]:
    """What every plan does, by name, where no fused GPU kernels run."""
    b, r, i, o, k, ragged, *_ = layer
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
    plans = {
        "contract": Work(1, cuts["r"], cuts["r"] * p * k, 0, r * p * k, pairs, 0),
        "tile": Work(1, cuts["b"], cuts["b"] * p * k, b * o, b * p * k, weights, r * p),
        "materialize": whole,
    }
    if layer.transform:  # products of x with the head are linear in the weights
        del plans["contract"]
    return plans


@lru_cache(maxsize=4096)
def costs(layer: Sizes, dtype: torch.dtype, device: str = "cpu") -> dict[str, Cost]:
    """The cost of every plan of :func:`work`, by name; ``device`` is a :func:`device_key`."""
    itemsize = dtype.itemsize
    if device in gpu.GPU:
        return gpu.costs(layer, itemsize, device)
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


def device_key(device: str, dtype: torch.dtype) -> str:
    """What the choice of plan depends on besides sizes: a key of :data:`RATES`, or of
    :data:`hyperfast.plans.gpu.GPU` where fused kernels run, or ``"cpp"``."""
    if device == "cuda" and gpu.HAS_TRITON:
        return gpu.arithmetic(dtype)
    return "cpp" if device == "cpu" and cpu.EXTENSION is not None else device


@lru_cache(maxsize=4096)
def choose(layer: Sizes, dtype: torch.dtype, device: str = "cpu") -> str:
    """The name of the plan that runs: the one of least cost, and in C++ that of its own rule."""
    if device == "cpp":
        return cpu.plan(layer, dtype)
    return min(costs(layer, dtype, device).values(), key=lambda c: c.seconds).plan
