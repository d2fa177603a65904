"""What races on the device: networks, single layers, banks; and what each is to reach."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

from bench.gpu.device import KINDS, REHEARSAL
from bench.workloads import MODES, WORKLOADS, BankWorkload, Workload

FEW = Workload("few128", B=4096, N=1, z_dim=32, H=64, sizes=(128, 128, 128))
MANY = Workload("many64", B=65536, N=1, z_dim=32, H=64, sizes=(64, 64, 10))
ROWS = (1, 2, 4, 8, 16, 64, 256)
# The CPU's workloads for eight times as many tasks.
TABLE = [w.scaled(8) for w in WORKLOADS.values() if isinstance(w, Workload) and w.B > 1]

# Who asks: as in punica's measurements, each row another task; any task; the n-th most popular
# with a probability of n^-1.5; all rows the same.
PATTERNS = ("distinct", "uniform", "skewed", "identical")
CACHE = 256 << 20  # bytes: several times a last-level cache


@dataclass(frozen=True)
class PatternBank:
    """Requests of ``rows`` mixed rows to stored networks, asked for in one of PATTERNS; as many
    requests as read more than the caches hold, if each reads what it can."""

    bank: BankWorkload
    pattern: str

    modes = MODES[:1]

    @property
    def name(self) -> str:
        return f"bank{self.bank.tasks}_r{self.bank.rows}_{self.pattern}"


@dataclass(frozen=True)
class LayerWorkload:
    """One layer of one row a task: ``y[b,o] = sum_ik V[o,i,k] x[b,i] h[b,k]``."""

    name: str
    B: int
    ins: int
    features: int
    outs: int

    modes = MODES[:1]

    def flops(self, mode: str) -> int:
        return 2 * self.B * self.outs * self.ins * (self.features + 1)

    def bytes(self, mode: str, itemsize: int) -> int:
        sides = self.B * (self.ins + self.features + self.outs)
        return itemsize * (sides + self.outs * self.ins * self.features)


LAYERS = (
    LayerWorkload("layer128", B=4096, ins=128, features=64, outs=128),
    LayerWorkload("bilinear64", B=1024, ins=64, features=64, outs=64),  # as FlagGems measures
)


def banks() -> list[PatternBank]:
    """Of 64-64-10: few rows, many, and so few tasks that a grouped product takes them."""
    found = []
    for tasks, rows in ((100_000, 65_536), (100_000, 4096), (1000, 16_384), (100_000, 64)):
        requests = min(max(math.ceil(CACHE / (rows * 2 * 4810)), 2), 8)
        bank = BankWorkload("", tasks=tasks, rows=rows, sizes=(64, 64, 10), requests=requests)
        found += [PatternBank(bank, pattern) for pattern in PATTERNS]
    return found


Any_ = Workload | PatternBank | LayerWorkload


@dataclass(frozen=True)
class Job:
    """One race; how ``thorough``: from 1 on with rivals that are compiled, which takes some 10
    seconds each, with 2 also with those that take longer."""

    workload: Any_
    mode: str
    kind: str
    thorough: int

    @property
    def bar(self) -> float:
        """How many times longer the best rival should take at least: 3 forward and 2 in training
        where at most 4 rows share a task, and elsewhere no less than 0.95."""
        w = self.workload
        few = isinstance(w, LayerWorkload) or (isinstance(w, Workload) and w.N <= 4 and w.B >= 1000)
        return (3.0 if self.mode == MODES[0] else 2.0) if few else 0.95


def jobs() -> list[Job]:
    """The most telling first."""
    kinds = [kind for kind in ("bf16", "fp32") if kind in KINDS]
    best = kinds[0]
    few = [replace(FEW, name=f"few128_n{n}", N=n) for n in ROWS[1:]]
    found = [Job(FEW, mode, best, 1) for mode in MODES]
    found += [Job(b, MODES[0], best, int(b.name == "bank100000_r4096_uniform")) for b in banks()]
    found += [Job(w, MODES[0], kind, int(kind == best)) for w, kind in product(LAYERS, kinds)]
    found += [Job(MANY, mode, best, 1) for mode in MODES]
    found += [Job(w, MODES[0], best, int(w.N in (4, 64))) for w in few]
    found += [Job(w, MODES[1], best, 0) for w in few]
    found += [Job(w, mode, "fp32", 0) for w in (FEW, MANY) for mode in MODES]
    found += [Job(bank, MODES[0], "fp32", 0) for bank in banks()]
    found += [Job(w, mode, "fp32", 0) for w in few for mode in MODES]
    found += [Job(w, mode, "high", 2 * (mode == MODES[0])) for w in (FEW, MANY) for mode in MODES]
    found += [Job(w, mode, best, 0) for w in TABLE for mode in MODES]
    if REHEARSAL:  # one of each: a network, a layer, who asks a bank
        each = {(tiny(job.workload).name, job.mode): job for job in reversed(found)}
        of_each: list[Any_] = [FEW, LAYERS[0], *banks()]
        wanted = {(tiny(w).name, mode) for w in of_each for mode in w.modes}
        each = {key: job for key, job in each.items() if key in wanted}
        # Rivals are compiled, for most of a minute, once for each sort of workload.
        first = {type(job.workload): job for job in reversed(each.values())}
        return [
            replace(job, workload=tiny(job.workload), thorough=2 * (job in first.values()))
            for job in each.values()
        ]
    return list(dict.fromkeys(found))


def tiny(w: Any_) -> Any_:
    if isinstance(w, PatternBank):
        return replace(w, bank=replace(w.bank, tasks=9, rows=7, sizes=(8, 8, 3), requests=2))
    if isinstance(w, LayerWorkload):
        return replace(w, B=3, ins=4, features=3, outs=5)
    return tiny_network(w)


def tiny_network(w: Workload) -> Workload:
    sizes = tuple(min(s, 5) for s in w.sizes)
    return replace(w, B=3, N=min(w.N, 2), z_dim=3, H=4, sizes=sizes)
