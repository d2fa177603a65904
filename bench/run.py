"""``python -m hyperfast bench``: run the races, save results, print tables, draw the plot."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.catalog import RIVALS, WORKLOADS
from bench.measure import calibrate, machine
from bench.real.registry import REAL
from bench.rivals import OURS
from bench.show import calibration, plots, results_file, tables

BENCH = Path(__file__).resolve().parent
CALIBRATION = BENCH / "results" / "calibration.json"

# A smoke test: one small workload without and one with many rows, the real ones at the size of a
# test; no long compilation, and no package that takes seconds to import.
QUICK_WORKLOADS = ("mlp8_1024", "digits_inr", *REAL)
QUICK_RIVALS = (OURS, "loop", "vmap", "bmm", "jax", "formula", "shortcut")
QUICK_ROUNDS = 3
ROUNDS = 10


def _names(known: Mapping[str, object]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown)}; there are: {', '.join(known)}"
            )
        return names

    return parse


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m hyperfast bench",
        description="Times hyperfast beside its rivals, in turns, on named workloads.",
    )
    p.add_argument(
        "--quick",
        action="store_true",
        help="a smoke test, real workloads at tiny sizes; about a minute",
    )
    p.add_argument(
        "--only", type=_names(WORKLOADS), metavar="WORKLOAD,...", help=", ".join(WORKLOADS)
    )
    p.add_argument("--rivals", type=_names(RIVALS), metavar="RIVAL,...", help=", ".join(RIVALS))
    p.add_argument("--threads", type=int, default=machine.cores(), help="for every rival alike")
    p.add_argument(
        "--rounds", type=int, help=f"turns of each rival ({ROUNDS}; quick: {QUICK_ROUNDS})"
    )
    p.add_argument("--scale", type=int, default=1, help="times as many tasks")
    p.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where to save results, the plots speed.png and roofline.png beside it; by default "
        "bench/results/ under the machine's name, where --only replaces those workloads alone. "
        "--quick, --rivals, --rounds and --scale save nothing unless told where",
    )
    p.add_argument(
        "--calibrate",
        action="store_true",
        help="time every plan of single layers instead, fit the rates of the plans, and "
        "save the measurements as calibration.json, or where --json says; about 2 minutes",
    )
    p.add_argument(
        "--report", type=Path, metavar="FILE", help="show (or fit) these results; run nothing"
    )
    p.add_argument("--markdown", action="store_true", help="tables as Markdown")
    p.add_argument(
        "--compare",
        type=Path,
        metavar="FILE",
        help="older results: exit status 3 when on any workload our ratio to the rivals, in the "
        "median over rivals, fell by more than --tolerance",
    )
    p.add_argument("--tolerance", type=float, default=0.15, metavar="SHARE", help="default: 0.15")
    return p


def measure(args: argparse.Namespace) -> tuple[results_file.Results | None, int]:
    """Runs pytest in a process of its own, where threads are set before anything is imported."""
    workloads = args.only or (QUICK_WORKLOADS if args.quick else tuple(WORKLOADS))
    rivals = args.rivals or (QUICK_RIVALS if args.quick else tuple(RIVALS))
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmark.json"
        command = [
            *(sys.executable, "-m", "pytest", str(BENCH), "-q", "-p", "no:cacheprovider"),
            *("--rootdir", str(BENCH.parent), "--benchmark-json", str(file)),
            "--benchmark-quiet",
            *("-W", "default"),  # a run in which every rival is absent is no error
            *("--benchmark-columns", "median,iqr,rounds", "--benchmark-sort", "name"),
            *("--workloads", ",".join(workloads), "--rivals", ",".join(rivals)),
            *("--rounds", str(rounds), "--threads", str(args.threads), "--scale", str(args.scale)),
            *(["--small"] if args.quick else []),
        ]
        status = subprocess.run(command, cwd=BENCH.parent).returncode
        if not file.exists() or not (text := file.read_text()):
            return None, status or 1
        return results_file.collect(json.loads(text)), status


def save(new: results_file.Results, path: Path, keep: bool) -> None:
    """The file and its pictures; `keep`: what the file holds of other workloads stays."""
    if keep and path.exists():
        new = results_file.merge(results_file.read(path), new)
    results_file.write(new, path)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed", file=sys.stderr)
        return
    shapes = tables.part(new, False)
    if shapes["workloads"]:
        plots.speed(shapes, path.parent / "speed.png")
        plots.roofline(shapes, path.parent / "roofline.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 fine, 1 a rival was wrong or failed, 2 wrong usage, 3 slower than before."""
    p = parser()
    args = p.parse_args(argv)
    if args.calibrate:
        path = args.report or args.json or CALIBRATION
        if not args.report:
            results_file.write(calibrate.measure(args.threads), path)
        print(calibration.text(results_file.read(path)["results"]))
        return 0
    old = results_file.read(args.compare) if args.compare else None
    status = 0
    if args.report:
        new = results_file.read(args.report)
    else:
        if importlib.util.find_spec("pytest_benchmark") is None:
            print("hyperfast bench: needs the extra: pip install -e '.[bench]'", file=sys.stderr)
            return 2
        measured, status = measure(args)
        if measured is None:
            return status
        new = measured
        measured_fully = not (args.quick or args.rivals or args.rounds or args.scale != 1)
        path = args.json
        if path is None and measured_fully and status == 0:
            name = machine.machine_key(new["machine"], new["threads"])
            path = BENCH / "results" / f"{name}.json"
        if path:
            save(new, path, keep=bool(args.only))
    print(tables.text(new, args.markdown))
    if old is not None:
        if old["machine"] != new["machine"] or old["threads"] != new["threads"]:
            print("compared with results of another machine or number of threads")
        fallen = list(results_file.regressions(old, new, args.tolerance))
        print("\n".join(f"slower: {line}" for line in fallen))
        if fallen and status == 0:
            status = 3
    return status


if __name__ == "__main__":
    sys.exit(main())
