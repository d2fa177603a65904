"""The results file: what one run found, small and stable enough to commit and to compare."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from bench.catalog import RIVALS, WORKLOADS, sized
from bench.measure.race import rounded
from bench.rivals import OURS
from bench.workloads import MODES

Results = dict[str, Any]
Row = dict[str, Any]


def _key(row: Row) -> tuple[int, int, int]:
    return (
        list(WORKLOADS).index(row["workload"]),
        MODES.index(row["mode"]),
        list(RIVALS).index(row["rival"]),
    )


def _row(benchmark: Row) -> Row:
    info, stats = benchmark["extra_info"], benchmark["stats"]
    ratio, low, high = info["ratio"] or (None, None, None)
    return {
        "workload": info["workload"],
        "mode": info["mode"],
        "rival": info["rival"],
        "median_s": rounded(stats["median"]),
        "iqr_s": rounded(stats["iqr"]),
        "samples": stats["rounds"],
        "ratio": rounded(ratio),
        "ratio_q1": rounded(low),
        "ratio_q3": rounded(high),
        "peak_extra_bytes": info["peak_extra_bytes"],
        "gflops": rounded(info["flops"] / stats["median"] / 1e9),
        "gbytes": rounded(info["bytes"] / stats["median"] / 1e9),
        "error_share_of_budget": rounded(info["error_share_of_budget"]),
        "foreign_load": rounded(info["foreign_load"], 2),
    }


def collect(report: Row) -> Results:
    """pytest-benchmark's JSON -> ours."""
    run = dict(report["hyperfast"])
    absent = run.pop("absent")
    rows = sorted((_row(benchmark) for benchmark in report["benchmarks"]), key=_key)
    names = {row["workload"] for row in rows} | {row["workload"] for row in absent}
    workloads = {}
    for name in WORKLOADS:
        if name in names:
            scaled = sized(name, run["scale"], run["small"])
            workloads[name] = scaled.facts() | {
                "flops": {mode: scaled.flops(mode) for mode in scaled.modes},
                "measured": {key: run[key] for key in ("date", "commit", "rounds", "versions")},
                "bytes": {mode: scaled.bytes(mode) for mode in scaled.modes},
            }
    return {
        **run,
        "rivals": {name: rival.about for name, rival in RIVALS.items()},
        "workloads": workloads,
        "absent": sorted(absent, key=_key),
        "results": rows,
    }


def merge(old: Results, new: Results) -> Results:
    """The new results, and the old ones of workloads that were not measured again."""
    same = ("machine", "threads", "scale", "small")
    if any(old.get(key, False) != new[key] for key in same):
        return new
    workloads = {**old["workloads"], **new["workloads"]}

    def rows(key: str) -> list[Row]:
        kept = [row for row in old[key] if row["workload"] not in new["workloads"]]
        return sorted((r for r in kept + new[key] if r["workload"] in WORKLOADS), key=_key)

    highest = {
        key: max(results["ceilings"][key] for results in (old, new) if results["ceilings"])
        for key in (new["ceilings"] or old["ceilings"] or {})
    }
    return {
        **new,
        "ceilings": highest or None,
        "workloads": {name: workloads[name] for name in WORKLOADS if name in workloads},
        "absent": rows("absent"),
        "results": rows("results"),
    }


def write(results: Results, path: Path) -> None:
    """Header indented, then one line a row, so that a diff shows what changed."""
    header = {key: value for key, value in results.items() if key != "results"}
    text = json.dumps(header, indent=1).removesuffix("\n}")
    rows = ",\n".join("  " + json.dumps(row) for row in results["results"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{text},\n "results": [\n{rows}\n ]\n}}\n')


def read(path: Path) -> Results:
    return json.loads(path.read_text())


def ratios(results: Results) -> dict[tuple[str, str, str], float]:
    """(workload, mode, rival) -> how many times longer the rival takes than we do."""
    return {
        (row["workload"], row["mode"], row["rival"]): row["ratio"]
        for row in results["results"]
        if row["ratio"] is not None and row["rival"] != OURS
    }


def regressions(old: Results, new: Results, share: float) -> Iterator[str]:
    """A line for each workload and mode where our ratio to the rivals fell by more than `share`.

    The change of a ratio is the median of its changes over all rivals: a change of ours moves all
    of them, the noise of one rival only its own. ValueError when nothing can be compared, for a
    comparison of nothing must not pass.
    """
    before, after = ratios(old), ratios(new)
    changes: dict[tuple[str, str], list[float]] = {}
    for workload, mode, rival in after:
        key = (workload, mode, rival)
        if key in before:
            changes.setdefault((workload, mode), []).append(after[key] / before[key])
    if not changes:
        raise ValueError("the two results have no workload, mode and rival in common")
    for (workload, mode), values in changes.items():
        if median(values) < 1 - share:
            yield f"{workload} {mode}: ratios to rivals are {median(values):.2f} of what they were"
