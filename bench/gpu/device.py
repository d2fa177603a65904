"""The device: kinds of arithmetic, a turn timed by its events, memory, ceilings.

Under TRITON_INTERPRET=1 it is the CPU, to rehearse with tiny sizes.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

from bench.measure.race import flat, race
from bench.rivals.rival import Call
from hyperfast.info import assembler

REHEARSAL = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
ROUNDS = 1 if REHEARSAL else 5
TURN, MOST_CALLS = 5e-3, 50  # seconds and calls of a turn

# Kinds of arithmetic: dtype, and the precision of fp32 products. For "high" a library has TF32, our
# kernels have two parts of bf16, and three for "highest".
KINDS = {
    "bf16": (torch.bfloat16, "highest"),
    "high": (torch.float32, "high"),
    "fp32": (torch.float32, "highest"),
    "fp64": (torch.float64, "highest"),
}
if REHEARSAL:  # the interpreter has no bf16
    del KINDS["bf16"]


def select(kind: str) -> torch.dtype:
    """Sets the precision of fp32 products by the older interface, which compilers read too."""
    dtype, precision = KINDS[kind]
    torch.set_float32_matmul_precision(precision)
    return dtype


def facts() -> dict[str, str]:
    """The device, and who assembles for it."""
    if REHEARSAL:
        return {"device": platform.processor() or "CPU", "ptxas": str(assembler())}
    capability = torch.cuda.get_device_capability()
    tool = "" if torch.version.hip else str(assembler(capability))
    return {"device": torch.cuda.get_device_name(), "ptxas": tool}


def event_seconds(call: Callable[[], object], count: int) -> float:
    """Mean of a few calls in a row, between two events on the device."""
    if REHEARSAL:
        return host_seconds(call, count)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / count


def host_seconds(call: Callable[[], object], count: int) -> float:
    """The same by the clock on the wall: for what does not run on PyTorch's stream."""
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def turn(call: Callable[[], object]) -> list[float]:
    """A call that sets the number of calls, then the mean of these. What does not run on PyTorch's
    stream says so by an attribute ``host_clock``."""
    seconds = host_seconds if getattr(call, "host_clock", False) else event_seconds
    count = min(max(int(TURN / seconds(call, 1)), 1), MOST_CALLS)
    return [seconds(call, count)]


def medians(calls: Mapping[str, Call], rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds a call: rivals in turns, the median over rounds."""
    rounds = min(rounds, ROUNDS)
    return {name: median(flat(times)) for name, times in race(calls, rounds, turn).items()}


def peak_extra(call: Call) -> int | None:
    """Bytes allocated at most during a call, on top of what lives and of what it returns."""
    if REHEARSAL:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = call()
    torch.cuda.synchronize()
    kept = sum(t.nbytes for t in outputs)
    return max(torch.cuda.max_memory_allocated() - before - kept, 0)


def ceilings() -> dict[str, float]:
    """FLOP/s of a library's product of random matrices of each kind; bytes/s read and written by a
    copy, and by one that stays in the last-level cache."""
    found = {}
    n = 64 if REHEARSAL else 8192
    for kind in KINDS:
        dtype = select(kind)
        size = n // 2 if kind in ("fp32", "fp64") else n
        a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
        times = medians({"": lambda a=a, b=b: (a @ b,)})  # type: ignore[misc]
        found[kind] = 2 * size**3 / times[""]
    for name, floats in (("copy", 1 << 28), ("cache", 1 << 21)):
        source = torch.randn(1 << 14 if REHEARSAL else floats, device=DEVICE)
        target = torch.empty_like(source)
        copy = {"": lambda t=target, s=source: (t.copy_(s),)}
        found[name] = 2 * source.nbytes / medians(copy)[""]
    return found
