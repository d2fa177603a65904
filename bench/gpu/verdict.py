"""What the rows of a run say: how far from its bar each race is, and which figures to change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from bench.gpu.rivals import GRAPH
from bench.rivals import OURS
from bench.show import page, tables

Row = dict[str, Any]
COPIED = 0.8  # of the rate of a copy a bank should read and write
TOLERATED = 8.0  # times the error of plain PyTorch, from which an answer counts as wrong


class Gap(NamedTuple):
    """What one of ours reached in one race, and what it should."""

    race: tuple[str, str, str]  # workload, mode, kind
    rival: str
    reached: float
    bar: float
    what: str

    @property
    def times(self) -> float:
        """How many times as good it has to become; up to 1 it is good."""
        return self.bar / max(self.reached, 1e-9)

    def __str__(self) -> str:
        return (
            f"{' '.join(self.race):<46} {self.rival:<16} {self.reached:>6.2f} of "
            f"{self.bar:.2f} {self.what}"
        )


def races(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """(workload, mode, kind) -> rival -> row."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        race = row["workload"], row["mode"], row["kind"]
        found.setdefault(race, {})[row["rival"]] = row
    return found


def wrong(row: Row) -> bool:
    """Whether an answer is further from the truth than rounding takes it; int8 rounds the
    weights, too."""
    if "error" not in row or "int8" in row["rival"]:
        return False
    return not row["error"] <= TOLERATED * row["error_of_plain"] + 1e-6


def gaps(rows: Iterable[Row]) -> list[Gap]:
    """What is below its bar, the furthest first: eager against eager and compiled rivals, a graph
    against graphs; banks of requests that reach the memory against a copy."""
    found = []
    for race, by_rival in races(rows).items():
        timed = {n: r for n, r in by_rival.items() if "seconds" in r and not wrong(r)}
        for name in (OURS, OURS + GRAPH):
            if (ours := timed.get(name)) is None:
                continue
            others = [
                row["seconds"]
                for n, row in timed.items()
                if not n.startswith(OURS) and n.endswith(GRAPH) == name.endswith(GRAPH)
            ]
            if others:
                ratio = min(others) / ours["seconds"]
                found.append(Gap(race, name, ratio, ours["bar"], "times the best rival"))
            distinct = race[0].startswith("bank") and race[0].endswith(("distinct", "uniform"))
            if distinct and name.endswith(GRAPH):
                share = ours["bytes_share"]
                found.append(Gap(race, name, share, COPIED, "of the rate of a copy"))
    return sorted((g for g in found if g.times > 1), key=lambda g: -g.times)


def text(rows: Sequence[Row], markdown: bool = False) -> str:
    """A table for each kind and mode: time and shares of ceilings of ours, ratios of the others."""
    lines = []
    for kind, mode in dict.fromkeys((row["kind"], row["mode"]) for row in rows):
        here = {r: by for r, by in races(rows).items() if r[1:] == (mode, kind)}
        names = [n for n in dict.fromkeys(n for by in here.values() for n in by) if n != OURS]
        body = []
        for (workload, *_), by_rival in here.items():
            ours = by_rival.get(OURS, {})
            cells = [cell(by_rival.get(name), ours) for name in names]
            told = [f"{ours[share]:.0%}" if share in ours else "-" for share in SHARES]
            mine = tables.duration(ours["seconds"]) if "seconds" in ours else "failed"
            bar = next(row["bar"] for row in by_rival.values())
            body.append([workload, mine, *told, page.times(bar), *cells])
        header = ["workload", OURS, "of FLOP/s", "of a copy", "bar", *names]
        lines += [
            f"{kind}, {mode}: time of {OURS}, then how many times longer others take; the best "
            f"rival should take the bar, and distinct rows of a bank reach {COPIED:.0%} of a copy",
            "",
        ]
        lines += [*tables.table(header, body, markdown), ""]
    return "\n".join(lines)


SHARES = ("flops_share", "bytes_share")


def cell(row: Row | None, ours: Row) -> str:
    if row is None or "absent" in row:
        return "-"
    if "seconds" not in row:
        return "failed"
    if wrong(row):
        return "wrong"
    return page.times(row["seconds"] / ours["seconds"]) if "seconds" in ours else "-"


def figures(result: Row) -> list[str]:
    """The lines of hyperfast/plans/gpu.py that this run would write."""
    ceilings, launches = result.get("ceilings"), result.get("launch_seconds")
    if not ceilings or not launches:
        return []
    launch = launches["hyper_linear"]
    lines = [f'"{result["device"]}": Machine({ceilings["copy"]:.3g}, {launch:.2g})']
    lines += [f"GPU_CACHE = {ceilings['cache']:.2g}"]
    if "sort_seconds" in result:
        lines += [f"GPU_SORT = {result['sort_seconds']:.2g}"]
    fused = {row["kind"]: row["flops_per_s"] for row in result.get("plans", [])}
    names = {"bf16": "half"}
    for kind, rate in fused.items():
        lines.append(f'"{names.get(kind, kind)}": Gpu({rate:.3g}, {ceilings[kind]:.3g})')
    return lines


def summary(result: Row) -> str:
    """What is wrong, what to mend first, and figures to put into the plans."""
    rows = result["rows"]
    lines = [text(rows)] if rows else []
    for tested in result.get("exact", []):
        lines.append(
            f"ptxas {tested['ptxas']}: {tested['shapes']} shapes, {tested['repeats']} times each: "
            f"{len(tested['wrong'])} wrong, {len(tested['failed'])} failed"
        )
        lines += [f"  wrong: {fault}" for fault in tested["wrong"][:5]]
        lines += [f"  failed: {fault}" for fault in tested["failed"][:5]]
    bad = [row for row in rows if "failed" in row or wrong(row)]
    lines += [
        f"{'failed' if 'failed' in r else 'wrong'}: {r['workload']} {r['mode']} {r['kind']} "
        f"{r['rival']}: {r.get('failed') or r['error']}"
        for r in bad
    ]
    lines += [f"failed: {told}" for told in result["failed"]]
    below = gaps(rows)
    lines += ["", "below the bar, the furthest first:", *(f"  {gap}" for gap in below[:15])]
    if not below:
        lines[-1] = "nothing is below its bar" if rows else "no race was run"
    if found := figures(result):
        lines += ["", "for hyperfast/plans/gpu.py:", *(f"  {line}" for line in found)]
    if left := result["left_out"]:
        lines.append(f"left out for lack of time: {len(left)}, the first {left[0]}")
    return "\n".join(lines)
