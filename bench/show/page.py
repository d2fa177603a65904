"""``python -m bench.show.page RESULTS.json``: the tables of bench/README.md."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from bench.rivals import OURS
from bench.show import results_file, tables
from bench.show.plots import FAMILIES, fastest
from bench.workloads import MODES

# Those that the page shows, each by its fastest member.
SHOWN = ("Python loop", "vmap", "bmm", "compiled bmm", "JAX")

# Of a real workload: who it is told against, eager and compiled, and what else PyTorch can do.
PEERS = ("package", "formula")
COMPILED = tuple(f"{name} compiled" for name in PEERS)
SHORTCUTS = ("shortcut", "shortcut compiled")
BAR = 3  # blocks for a doubling


def work(fact: dict[str, Any]) -> str:
    """What a workload is, in a few words."""
    sizes = "-".join(map(str, fact["sizes"]))
    if "tasks" in fact:
        return f"`{fact['name']}`: {fact['tasks']:,} stored, {fact['rows']:,} mixed rows, {sizes}"
    sine = ", sines" if fact["activation"] == "sin" else ""
    return f"`{fact['name']}`: {fact['B']:,} x {fact['N']:,}, {sizes}{sine}"


def times(ratio: float) -> str:
    """Two digits, or as many as stand before the point."""
    return f"{ratio:.2f}x" if ratio < 1 else f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x"


def speeds(results: results_file.Results, mode: str) -> str:
    """Time of ours, and how many times longer the others take."""
    body = []
    for name, by_rival in tables.rows_of(tables.part(results, False), mode).items():
        found = [fastest(by_rival, FAMILIES[family][2]) for family in SHOWN]
        cells = [times(row["ratio"]) if row else "-" for row in found]
        ours = tables.duration(by_rival[OURS]["median_s"])
        body.append([work(results["workloads"][name]), ours, *cells])
    return "\n".join(tables.table(["workload: tasks x rows, sizes", OURS, *SHOWN], body, True))


def real(results: results_file.Results, mode: str) -> str:
    """The same of the real workloads: to the peer eager and compiled, to the faster of these, and
    to the fastest plain PyTorch; the bar is on a logarithmic scale."""
    body = []
    for name, by_rival in tables.rows_of(tables.part(results, True), mode).items():
        if OURS not in by_rival:
            continue
        eager, compiled, peer, shortcut = (
            fastest(by_rival, names) for names in (PEERS, COMPILED, PEERS + COMPILED, SHORTCUTS)
        )
        ratio = peer["ratio"] if peer else 1.0
        fact = results["workloads"][name]
        body.append(
            [
                f"`{name}`: {fact['about']}",
                tables.duration(by_rival[OURS]["median_s"]),
                *(times(row["ratio"]) if row else "-" for row in (eager, compiled, peer)),
                bar(ratio),
                times(shortcut["ratio"]) if shortcut else "-",
                *(tables.mebibytes(row) for row in (by_rival[OURS], peer)),
            ]
        )
    header = ["workload", OURS, "peer", "compiled", "the faster", "", "shortcut", "MiB", "peer's"]
    return "\n".join(tables.table(header, body, True))


def bar(ratio: float) -> str:
    return "█" * max(round(BAR * math.log2(max(ratio, 1))), 0)


def limits(results: results_file.Results) -> str:
    """How near the machine's ceilings ours comes."""
    body = []
    for mode in MODES:
        for name, by_rival in tables.rows_of(tables.part(results, False), mode).items():
            ours = by_rival[OURS]
            over = f"{tables.over_floor(ours, results['ceilings']):.1f}x"
            body.append(
                [f"`{name}` {mode}", f"{ours['gflops']:.0f}", f"{ours['gbytes']:.1f}", over]
            )
    return "\n".join(tables.table(["workload", "GFLOP/s", "GB/s", "over the floor"], body, True))


if __name__ == "__main__":
    found = results_file.read(Path(sys.argv[1]))
    made = [show(found, mode) for show in (speeds, real) for mode in MODES]
    print("\n\n".join([*made, limits(found)]))
