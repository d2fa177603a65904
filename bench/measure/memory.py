"""Peak extra memory of one call, in the same way for every library: resident pages of a process.

Linux can reset a process's peak (clear_refs), so what one call needs on top of what lives is peak
minus present. That holds only while freed memory goes back at once, whichever thread freed it, so
the rivals are weighed in a process of their own where glibc maps every block above 64 KiB by
itself; timed there, they would pay for page faults that users do not have. What the call returns is
not counted: a training step of every rival returns the same gradients. Each call runs in a thread
of its own, with a thread pool of its own, so that scratch memory which a library keeps for the
thread's next call counts too; what it keeps for the whole process counts as living. Differences
below about a quarter of a MiB are noise: the kernel counts pages in batches.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from bench.measure import machine

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
REPEATS = 3

Peaks = dict[str, int]  # "workload/mode/rival" -> bytes


def unavailable() -> str | None:
    """Why the peak cannot be measured here, if so."""
    if sys.platform != "linux":
        return "not measured: a process's peak resident memory can be reset on Linux only"
    if not machine.is_glibc():
        return "not measured: the C library is not glibc, so freed memory may stay resident"
    try:
        _reset_peak()
    except OSError as error:
        return f"not measured: the kernel does not let a process reset its peak: {error.strerror}"
    return None


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _resident() -> tuple[int, int]:
    """Bytes resident now, and at the peak."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return now, peak


def peak_extra(call: Callable[[], tuple[Any, ...]]) -> int:
    """Bytes, the median of REPEATS calls; of use only in a process started with ENVIRONMENT."""
    peaks = []
    gc.collect()  # once: with these libraries loaded it takes a third of a second
    for _ in range(REPEATS):
        _reset_peak()
        before, _ = _resident()
        outputs = _in_new_thread(call)
        _, peak = _resident()
        peaks.append(max(peak - before - sum(out.nbytes for out in outputs), 0))
        del outputs
    return int(median(peaks))


def _in_new_thread(call: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(call).result()


def weigh(
    workloads: Sequence[str],
    rivals: Sequence[str],
    threads: int,
    scale: int = 1,
    small: bool = False,
) -> Peaks:
    """Every chosen rival in a child process; one that cannot run there is left out. RuntimeError
    when the child itself ends early, as it does where memory is short."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "peaks.json"
        task = json.dumps([list(workloads), list(rivals), threads, scale, small, str(file)])
        done = subprocess.run(
            [sys.executable, "-m", "bench.measure.memory", task],
            cwd=machine.ROOT,
            env={**os.environ, **ENVIRONMENT},
        )
        if done.returncode:
            raise RuntimeError(f"not measured: the process for it ended with {done.returncode}")
        return json.loads(file.read_text())


def _child(
    workloads: list[str], rivals: list[str], threads: int, scale: int, small: bool, file: str
) -> None:
    machine.use_threads(threads)
    import torch

    from bench.catalog import field, sized
    from bench.problem import make_problem

    peaks: Peaks = {}
    for workload in workloads:
        scaled = sized(workload, scale, small)
        problem = make_problem(scaled)
        for mode in scaled.modes:
            torch._dynamo.reset()
            for rival, chosen in field(scaled).items():
                if rival not in rivals:
                    continue
                try:
                    call = chosen.build(problem.to(chosen.dtype), mode)
                    call()  # compiles
                    peaks[f"{workload}/{mode}/{rival}"] = peak_extra(call)
                except Exception:  # its own test tells what went wrong
                    continue
    Path(file).write_text(json.dumps(peaks))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _child(*json.loads(sys.argv[1]))
