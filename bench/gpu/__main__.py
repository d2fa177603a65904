"""``bench/gpu/gpu.sh`` runs this: hyperfast beside its rivals, and both beside what the GPU can do.

Rivals take turns; a time is the median over turns of CUDA events around a few calls. What does not
fit the time is left out, and listed as such. One JSON file holds it all.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import hyperfast
from bench.gpu import contest, device, kernels
from bench.gpu.device import REHEARSAL
from bench.gpu.workloads import BANK, jobs, tiny
from bench.measure import machine

SECONDS = 240  # for everything here


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny sizes, interpreted on the CPU"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--tests-exit", type=int, help="how the tests before this ended")
    args = parser.parse_args()
    if args.rehearse != REHEARSAL:
        parser.error("--rehearse goes with TRITON_INTERPRET=1: use bench/gpu/gpu.sh")
    if not REHEARSAL and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --rehearse runs without")
    begin = time.perf_counter()
    torch.manual_seed(0)
    result: dict[str, Any] = {
        **machine.circumstances(torch.get_num_threads()),
        "device": device.name(),
        "rehearsal": REHEARSAL,
        "tests_exit": args.tests_exit,
        "left_out": [],
        "failed": [],
        "rows": [],
    }

    def save() -> None:
        result["seconds"] = time.perf_counter() - begin
        args.out.write_text(json.dumps(result, indent=1) + "\n")

    def step(name: str, key: str, work: Callable[[], Any]) -> None:
        """Runs one part, unless the time is up; a failure is told, and the next part runs."""
        if time.perf_counter() - begin > SECONDS - 25:
            result["left_out"].append(name)
            return
        try:
            found = work()
        except Exception as failure:
            result["failed"].append(f"{name}: {type(failure).__name__}: {failure}"[:500])
            print(result["failed"][-1])
        else:
            if key == "rows":
                result[key] += found
                print("\n".join(map(contest.show, found)))
            else:
                result[key] = found
                print(key, json.dumps(found))
        gc.collect()
        if not REHEARSAL:
            torch.cuda.empty_cache()
        save()

    with hyperfast.use_backend("triton"):
        step("ceilings", "ceilings", device.ceilings)
        step("launch", "launch_seconds", kernels.launch_times)
        limits = result.get("ceilings", {})
        todo = list(jobs())
        for number, (w, mode, kind, rivals) in enumerate(todo):
            if number == 4:
                bank = replace(BANK, tasks=9, rows=20, sizes=(5, 4, 3)) if REHEARSAL else BANK
                step(bank.name, "rows", partial(contest.hold_bank, bank, limits))
                step("plans", "plans", kernels.plan_times)
                step("networks", "networks", kernels.network_times)
                step("configurations", "configurations", kernels.config_times)
            w = tiny(w) if REHEARSAL else w
            step(
                f"{w.name} {mode} {kind}",
                "rows",
                partial(contest.hold, w, mode, kind, rivals, limits),
            )
    save()
    print(f"{len(result['rows'])} rows, {len(result['left_out'])} left out, in {args.out}")
    broken = [r for r in result["rows"] if r["rival"].startswith("hyperfast") and "failed" in r]
    return bool(result["failed"] or broken)


if __name__ == "__main__":
    sys.exit(main())
