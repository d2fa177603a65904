"""What the machine can do at most, measured in the same run: FLOP/s in fp32, bytes read a second.

The best of several ways counts, for a ceiling that a kernel exceeds is none: a matrix product
through torch, a convolution (oneDNN, where torch's product is another library's), and, where there
is a C compiler, multiply-adds from registers and, on a matrix unit that multiplies bf16, the six
products that a product of floats takes there; a sum through torch, and a plain loop of loads.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix(".c")
SECONDS = 0.3  # spent on each way
READ = 256 << 20  # bytes, several times a last-level cache


def best(work: Callable[[], object], amount: float) -> float:
    """Amount a second in the fastest call."""
    work()
    fastest, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - begin)
    return amount / fastest


def _library(folder: str) -> ctypes.CDLL | None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    file = Path(folder) / "ceilings.so"
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
    done = subprocess.run([compiler, *flags, str(SOURCE), "-o", str(file)], capture_output=True)
    if done.returncode:
        return None
    library = ctypes.CDLL(str(file))
    library.multiply_add.argtypes = [ctypes.c_size_t, ctypes.c_float]
    library.multiply_add.restype = ctypes.c_float
    library.flops_per_round.restype = ctypes.c_size_t
    library.flops_per_tiles.restype = ctypes.c_size_t
    library.multiply_tiles.argtypes = [ctypes.c_size_t]
    library.multiply_tiles.restype = None
    library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.read_all.restype = ctypes.c_float
    return library


def measure(threads: int) -> dict[str, float]:
    """{"gflops": ..., "read_gbytes": ...}, with this many threads."""
    flops, reads = [], []
    for n in (512, 1024, 2048):
        a, b = torch.randn(n, n), torch.randn(n, n)
        flops.append(best(lambda a=a, b=b: a @ b, 2 * n**3))  # type: ignore[misc]
    image, kernel = torch.randn(1, 256, 28, 28), torch.randn(256, 256, 3, 3)
    flops.append(
        best(lambda: torch.nn.functional.conv2d(image, kernel), 2 * 26 * 26 * kernel.numel())
    )
    data = torch.ones(READ // 4)
    reads.append(best(data.sum, READ))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as pool:
        if library := _library(folder):
            rounds, count = 1 << 20, data.numel() // threads
            starts = [data.data_ptr() + 4 * count * t for t in range(threads)]

            def multiply_add() -> None:
                list(pool.map(lambda _: library.multiply_add(rounds, 0.5), range(threads)))

            def multiply_tiles() -> None:
                list(pool.map(lambda _: library.multiply_tiles(rounds // 32), range(threads)))

            def read() -> None:
                list(pool.map(lambda start: library.read_all(start, count), starts))

            flops.append(best(multiply_add, threads * rounds * library.flops_per_round()))
            if per_round := library.flops_per_tiles():
                flops.append(best(multiply_tiles, threads * (rounds // 32) * per_round))
            reads.append(best(read, 4 * count * threads))
    return {"gflops": max(flops) / 1e9, "read_gbytes": max(reads) / 1e9}
