"""Turns, ratios, memory, load."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from bench.absent import Unavailable
from bench.measure import ceilings, machine, memory, race
from bench.measure.contest import hold
from bench.measure.load import ForeignLoad
from bench.rivals import OURS
from bench.rivals.plain import bmm
from bench.rivals.rival import torch_rival
from tests.support.workloads import TINY

ROOT = Path(__file__).resolve().parents[2]


class FakeClock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def call(self, seconds: float, log: list[str], name: str):
        def run() -> None:
            log.append(name)
            self.now += seconds

        return run


def test_race_takes_turns_and_counts_each_call():
    clock, log = FakeClock(), []
    calls = {"slow": clock.call(1.0, log, "slow"), "fast": clock.call(0.01, log, "fast")}
    samples = race.race(calls, rounds=4, turn=partial(race.timed_turn, clock=clock))
    assert [len(turn) for turn in samples["slow"]] == [1] * 4
    assert all(2 <= len(turn) <= race.MOST_CALLS for turn in samples["fast"])
    assert race.flat(samples["slow"]) == pytest.approx([1.0] * 4)
    turns = [name for name, _ in itertools.groupby(log)]
    assert turns.count("slow") >= 2  # interleaved, not one after the other
    assert len(log) == 8 + sum(len(t) for t in samples["fast"]) + 4  # one untimed call a turn


def test_drift_cancels_in_the_ratio():
    ours = [[1.0, 1.0], [3.0, 3.0], [9.0, 9.0]]  # the machine slows down threefold, twice
    rival = [[2.0], [6.0], [18.0]]
    assert race.ratio(rival, ours) == pytest.approx((2.0, 2.0, 2.0))


def test_foreign_load_is_a_share():
    with ForeignLoad() as load:
        sum(range(10**6))
    assert load.share is None or load.share >= 0


def test_contest_tells_absence_and_failure_apart():
    def missing(problem):
        raise Unavailable("no such package")

    def broken(problem):
        raise RuntimeError("broke")

    def wrong(problem):
        function, leaves = bmm(problem)
        return (lambda z, x: function(z, x) * 1.001), leaves

    rivals = [
        torch_rival(OURS, "", bmm),
        torch_rival("missing", "", missing),
        torch_rival("broken", "", broken),
        torch_rival("wrong", "", wrong),
    ]
    outcomes = hold(TINY, "forward", rivals, rounds=2)
    assert outcomes[OURS].share <= 1
    assert outcomes[OURS].ratio[0] == 1
    assert outcomes["missing"].absent == "no such package"
    assert isinstance(outcomes["broken"].failure, RuntimeError)
    assert outcomes["wrong"].share > 1


@pytest.mark.skipif(memory.unavailable() is not None, reason=str(memory.unavailable()))
def test_peak_memory_of_a_known_allocation():
    script = (
        "import torch; from bench.measure.memory import peak_extra\n"
        "def call():\n"
        "    temporary = torch.ones(8 * 2**20 // 4)\n"
        "    return (temporary[: 2 * 2**20 // 4] + 1,)\n"
        "call(); print(peak_extra(call))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **memory.ENVIRONMENT},
        capture_output=True,
        text=True,
        check=True,
    )
    # 8 MiB of temporary; the 2 MiB that are returned do not count
    assert int(done.stdout) / 2**20 == pytest.approx(8, abs=0.5)


@pytest.mark.skipif(memory.unavailable() is not None, reason=str(memory.unavailable()))
def test_rivals_are_weighed_in_a_process_of_their_own():
    assert memory.weigh(["mlp64_single"], ["bmm", "hyperfast TaskBank"], 1, 1).keys() == {
        "mlp64_single/forward/bmm",
        "mlp64_single/forward+backward/bmm",
    }


def test_results_are_filed_by_what_the_machine_shows():
    epyc = {"cpu": "AMD EPYC family 25 model 17", "cores": 2, "isa": ["avx2", "fma"]}
    assert machine.machine_key(epyc, 1) == "amd-epyc-family-25-model-17-avx2-2c-1t"
    wide = epyc | {"isa": ["avx2", "avx512f", "avx512_bf16"]}
    assert machine.machine_key(wide, 2) == "amd-epyc-family-25-model-17-avx512-bf16-2c-2t"
    none = {"cpu": "M4", "cores": 8, "isa": []}
    assert machine.machine_key(none, 8) == "m4-8c-8t"


def test_ceilings_are_above_a_plain_product_and_sum(monkeypatch):
    monkeypatch.setattr(ceilings, "SECONDS", 0.02)
    monkeypatch.setattr(ceilings, "READ", 1 << 22)
    found = ceilings.measure(1)
    assert found["gflops"] > 1
    assert found["read_gbytes"] > 0.1
    assert ceilings.best(lambda: time.sleep(0.005), 1.0) < 200


def test_each_race_is_held_once():
    """Rivals of a race follow one another, whatever pytest sorts tests by."""
    pytest.importorskip("pytest_benchmark")
    # Disabled: of benchmarks in a worker of xdist the plugin warns, and warnings are errors here.
    collect = ("bench", "-q", "--collect-only", "--benchmark-disable")
    names = ("--workloads", "mlp64_n32,siren,bank20000", "--rivals", "hyperfast,bmm,jax")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *collect, *names],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    tests = re.findall(r"test_speed\[(\w+-[a-z+]+)-\w+\]", done.stdout)
    assert len(tests) == 15
    assert len([name for name, _ in itertools.groupby(tests)]) == len(set(tests)) == 5
