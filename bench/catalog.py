"""Every workload and every entry by its name, and who races on what."""

from __future__ import annotations

from bench import rivals, workloads
from bench.problem import AnyWorkload
from bench.real.real import Real
from bench.real.registry import REAL
from bench.rivals.real import REAL_RIVALS
from bench.rivals.rival import Rival

WORKLOADS: dict[str, AnyWorkload] = {**workloads.WORKLOADS, **REAL}
RIVALS: dict[str, Rival] = {**REAL_RIVALS, **rivals.RIVALS}
RIVALS = {name: RIVALS[name] for name in (*rivals.RIVALS, *REAL_RIVALS)}


def sized(name: str, scale: int = 1, small: bool = False) -> AnyWorkload:
    """The workload with `scale` times as many tasks; `small`: a real one at the size of a test."""
    workload = WORKLOADS[name]
    if small and isinstance(workload, Real):
        workload = workload.small()
    return workload.scaled(scale)


def field(workload: AnyWorkload) -> dict[str, Rival]:
    """Who races on it; their builds may still raise Unavailable."""
    if isinstance(workload, Real):
        return REAL_RIVALS
    return {name: rivals.entry(name, workload) for name in rivals.RIVALS}
