"""``bench/gpu/gpu.sh`` runs this: are the kernels right, and how fast are they beside their rivals
and beside what the GPU can do.

Every part has its share of 8 minutes; what does not fit is left out, and listed as such. Rivals
take turns; a time is the median over turns of CUDA events around a few calls. One JSON file holds
it all, and is written after every step; at the end it is summed up: what is wrong, and what to mend
first.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import hyperfast
from bench.gpu import contest, device, kernels, verdict
from bench.gpu.device import REHEARSAL
from bench.gpu.workloads import jobs
from bench.measure import machine
from bench.rivals import OURS

# Seconds: of all, of the exactness of one assembler, of the tests.
ALL, EXACT, TESTS = 450, 40, 110
FIRST = 3 if REHEARSAL else 30  # races before what the plans rest on is measured
PTXAS = "TRITON_PTXAS_PATH"


def exactness() -> list[dict[str, Any]]:
    """In a process for each assembler: what fails on a device may end it."""
    found = []
    for path in dict.fromkeys((None, os.environ.get(PTXAS))):
        environment = {k: v for k, v in os.environ.items() if k != PTXAS}
        environment |= {PTXAS: path} if path else {}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "exact.json"
            environment["TRITON_CACHE_DIR"] = str(Path(folder) / "cache")
            command = [sys.executable, "-m", "bench.gpu.exact", "--seconds", str(EXACT)]
            status = run([*command, "--out", str(file)], EXACT + 15, environment)
            told: dict[str, Any] = {"ptxas": path or "Triton's own", "shapes": 0, "repeats": 0}
            told |= {"wrong": [], "failed": []}
            if file.exists():
                told = json.loads(file.read_text())
        if status:
            told["failed"].append(f"the process ended with {status}")
        found.append(told)
    return found


def tests() -> int:
    """The exit status of the tests on a GPU; 124 where they ran out of time."""
    file = "tests/kernels/triton/test_gpu.py"
    options = ["-q", "-p", "no:cacheprovider", "--maxfail=20", file]
    return run([sys.executable, "-m", "pytest", *options], TESTS, dict(os.environ))


def run(command: list[str], seconds: float, environment: dict[str, str]) -> int:
    try:
        done = subprocess.run(command, cwd=machine.ROOT, env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        return 124
    return done.returncode


class OutOfTime(BaseException):
    """No failure of a rival, over which a race would go on."""


def out_of_time(*_: object) -> None:
    """What runs is broken off, so that the rest can be summed up."""
    raise OutOfTime("the time is over")


class Run:
    """One run: its file, and what is left of its time."""

    def __init__(self, out: Path):
        self.out = out
        self.begin = time.perf_counter()
        self.result: dict[str, Any] = {
            **machine.circumstances(torch.get_num_threads()),
            **device.facts(),
            "rehearsal": REHEARSAL,
            "left_out": [],
            "failed": [],
            "rows": [],
        }

    def step(self, name: str, key: str, work: Callable[[], Any], seconds: float = 15) -> None:
        """Runs one part, unless it may take longer than there is time; a failure is told, and the
        next part runs."""
        if time.perf_counter() - self.begin > ALL - seconds:
            self.result["left_out"].append(name)
            return
        try:
            found = work()
        except (Exception, OutOfTime) as failure:
            self.result["failed"].append(f"{name}: {type(failure).__name__}: {failure}"[:500])
            print(self.result["failed"][-1])
        else:
            if key == "rows":
                self.result[key] += found
            else:
                self.result[key] = found
            print(f"{name}: {time.perf_counter() - self.begin:.0f} s")
        gc.collect()
        if not REHEARSAL:
            torch.cuda.empty_cache()
        self.save()

    def save(self) -> None:
        self.result["seconds"] = round(time.perf_counter() - self.begin, 1)
        self.out.write_text(json.dumps(self.result, indent=1) + "\n")


def failed(result: dict[str, Any]) -> bool:
    """Whether something of ours went wrong."""
    ours = [r for r in result["rows"] if r["rival"].startswith(OURS)]
    broken = [r for r in ours if "failed" in r or verdict.wrong(r)]
    inexact = [t for t in result.get("exact", [])[-1:] if t["wrong"] or t["failed"]]
    passed = (0, 5) if REHEARSAL else (0,)  # 5: no test ran
    untested = result.get("tests_exit", 1) not in passed
    return bool(result["failed"] or broken or inexact or untested)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny sizes, interpreted on the CPU"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    args = parser.parse_args()
    if args.rehearse != REHEARSAL:
        parser.error("--rehearse goes with TRITON_INTERPRET=1: use bench/gpu/gpu.sh")
    if not REHEARSAL and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --rehearse runs without")
    torch.manual_seed(0)
    signal.signal(signal.SIGTERM, out_of_time)
    whole = Run(args.out)
    whole.step("ceilings", "ceilings", device.ceilings)
    whole.step("exactness", "exact", exactness, 2 * (EXACT + 15))
    whole.step("tests", "tests_exit", tests, TESTS)
    with hyperfast.use_backend("triton"):
        whole.step("launch", "launch_seconds", kernels.launch_times)
        whole.step("sort", "sort_seconds", kernels.sort_time)
        limits = whole.result.get("ceilings", {})
        for number, job in enumerate(jobs()):
            if number == FIRST:
                whole.step("plans", "plans", kernels.plan_times)
                whole.step("networks", "networks", kernels.network_times)
                whole.step("configurations", "configurations", kernels.config_times)
            seconds = (8, 35, 90)[job.thorough]
            hold = partial(contest.hold, job, limits)
            whole.step(f"{job.workload.name} {job.mode} {job.kind}", "rows", hold, seconds)
    whole.save()
    result = whole.result
    print(verdict.summary(result))
    print(f"{len(result['rows'])} rows in {args.out}, {result['seconds']:.0f} s")
    return failed(result)


if __name__ == "__main__":
    sys.exit(main())
