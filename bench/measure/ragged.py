"""``python -m bench.measure.ragged``: what a call of few rows costs in banks of many tasks.

The rows name tasks at random. A bank is asked as it was made, with its slots in the order of its
ids; and after one update, when ids are looked up in its table. The last column is the op alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

import hyperfast
from bench.measure.race import quartiles

SIZES = (4, 4, 1)
TASKS = tuple(10**n for n in range(3, 8))
ROWS = (1, 64, 4096)


def microseconds(call: Callable[[], object], seconds: float) -> list[float]:
    """Times of one call, after three that are not counted."""
    for _ in range(3):
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e6)
    return times


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser("python -m bench.measure.ragged", description=__doc__)
    p.add_argument("--tasks", type=int, nargs="*", default=TASKS)
    p.add_argument("--rows", type=int, nargs="*", default=ROWS)
    p.add_argument("--seconds", type=float, default=0.3, help="of each measurement (0.3)")
    args = p.parse_args(argv)
    spec = hyperfast.MLPSpec(SIZES)
    print(f"{'tasks':>12} {'rows':>6} {'in order':>24} {'looked up':>24} {'op alone':>24}  us")
    for tasks in args.tasks:
        flat = torch.randn(tasks, spec.numel)
        bank = hyperfast.TaskBank.from_weights(spec, flat)
        changed = hyperfast.TaskBank.from_weights(spec, flat)
        changed.update([0], weights=flat[:1])
        columns = bank.contents.table.weights.segments[0].columns
        for rows in args.rows:
            x, ids = torch.randn(rows, SIZES[0]), torch.randint(1, tasks, (rows,))
            format, activations = bank.contents.format, bank.contents.activations

            def alone(x=x, ids=ids, columns=columns, format=format, activations=activations):
                with torch.no_grad():
                    return format.apply(activations, columns, x, ids)

            calls = (lambda: bank(x, ids), lambda: changed(x, ids), alone)  # noqa: B023
            found = []
            for call in calls:
                times = microseconds(call, args.seconds)
                low, _, high = quartiles(times)
                found.append(f"{median(times):>9.1f} ({low:.1f}-{high:.1f})")
            print(f"{tasks:>12,} {rows:>6,} " + " ".join(f"{text:>24}" for text in found))


if __name__ == "__main__":
    main()
