"""The CPU's workloads for eight times as many tasks, two of its own, and their order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from bench.gpu.device import KINDS
from bench.gpu.rivals import RIVALS
from bench.workloads import MODES, WORKLOADS, BankWorkload, Workload

FEW = Workload("few128", B=4096, N=1, z_dim=32, H=64, sizes=(128, 128, 128))
MANY = Workload("many64", B=65536, N=1, z_dim=32, H=64, sizes=(64, 64, 10))
BANK = BankWorkload("bank100000", tasks=100_000, rows=65_536, sizes=(64, 64, 10), requests=2)
TABLE = [w.scaled(8) for w in WORKLOADS.values() if isinstance(w, Workload) and w.B > 1]


def jobs() -> Iterator[tuple[Workload, str, str, tuple[str, ...]]]:
    """Workload, mode, kind and rivals, the most telling first."""
    best = next(iter(KINDS))
    slow = ("hyperfast graph", "bmm graph", "bmm compiled")
    for w, mode in product((FEW, MANY), MODES):
        yield w, mode, best, tuple(RIVALS)
    for n in (2, 4, 8, 16, 64, 256):
        yield replace(FEW, name=f"few128_n{n}", N=n), "forward", best, slow
    for w, kind, mode in product((FEW, MANY), ("tf32", "fp32"), MODES):
        yield w, mode, kind, slow
    for w, mode in product(TABLE, MODES):
        yield w, mode, best, slow
    for n in (2, 4, 16):
        yield replace(FEW, name=f"few128_n{n}", N=n), "forward+backward", best, slow


def tiny(w: Workload) -> Workload:
    sizes = tuple(min(s, 5) for s in w.sizes)
    return replace(w, B=3, N=min(w.N, 2), z_dim=3, H=4, sizes=sizes)
