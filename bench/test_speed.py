"""`pytest bench`: one test for each workload, mode and rival; right answers or the time is void.

pytest-benchmark times one test after another, so a machine that slows down would favour whoever
came early. Here the rivals of one workload and mode are timed in turns beforehand (race.py), and
each test replays its own samples into pytest-benchmark's clock.

forward is timed without gradients; forward+backward asks for gradients of all parameters of the
hypernetwork and of z, not of x.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from bench.conftest import ABSENT, chosen
from bench.measure.contest import Outcome
from bench.measure.machine import commit, versions
from bench.measure.memory import Peaks
from bench.rivals import RIVALS, entry
from bench.workloads import WORKLOADS


class ReplayClock:
    """Read twice for each sample: at its start and at its end."""

    def __init__(self) -> None:
        self.readings: Iterator[float] = iter(())

    def load(self, samples: Sequence[float]) -> None:
        self.readings = iter([reading for sample in samples for reading in (0.0, sample)])

    def __call__(self) -> float:
        return next(self.readings)


CLOCK = ReplayClock()

# Rivals' own deprecations are theirs to solve.
pytestmark = [pytest.mark.benchmark(timer=CLOCK), pytest.mark.filterwarnings("ignore")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    workloads = chosen(metafunc.config.getoption("--workloads"), WORKLOADS)
    contests = [(name, mode) for name in workloads for mode in WORKLOADS[name].modes]
    ids = ["-".join(contest) for contest in contests]
    rivals = chosen(metafunc.config.getoption("--rivals"), RIVALS)
    metafunc.parametrize("rival", rivals)
    metafunc.parametrize("contest", contests, indirect=True, ids=ids, scope="module")


def test_speed(
    contest: dict[str, Outcome],
    peaks: Peaks,
    rival: str,
    benchmark: Any,
    request: pytest.FixtureRequest,
) -> None:
    name, mode = request.node.callspec.params["contest"]
    outcome = contest[rival]
    if outcome.absent:
        request.config.stash[ABSENT].append(
            {"workload": name, "mode": mode, "rival": rival, "reason": outcome.absent}
        )
        pytest.skip(outcome.absent)
    if outcome.failure:
        raise outcome.failure

    CLOCK.load(outcome.samples)
    benchmark.group = f"{name} {mode}"
    benchmark.pedantic(lambda: outcome.outputs, rounds=len(outcome.samples))

    workload = WORKLOADS[name].scaled(request.config.getoption("--scale"))
    benchmark.extra_info.update(
        workload=name,
        mode=mode,
        rival=rival,
        ratio=outcome.ratio,
        peak_extra_bytes=peaks.get(f"{name}/{mode}/{rival}"),
        error_share_of_budget=outcome.share,
        foreign_load=outcome.foreign_load,
        flops=workload.flops(mode),
        bytes=workload.bytes(mode, entry(rival, workload).dtype.itemsize),
        threads=request.config.getoption("--threads"),
        versions=versions(),
        commit=commit(),
    )
    assert outcome.share is not None
    assert outcome.share <= 1, (
        f"{rival} is {outcome.share:.3g} times its error budget away from float64 on {name} {mode}"
    )
