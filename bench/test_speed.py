"""`pytest bench`: one test for each workload, mode and rival; right answers or the time is void.

pytest-benchmark times one test after another, so a machine that slows down would favour whoever
came early. Here the rivals of one workload and mode are timed in turns beforehand (race.py), and
each test replays its own samples into pytest-benchmark's clock.

forward is timed without gradients; forward+backward asks for gradients of all parameters of the
hypernetwork and of z, not of x; in a real workload, of its leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from bench.catalog import RIVALS, WORKLOADS, field, sized
from bench.conftest import ABSENT, chosen
from bench.measure.contest import Outcome
from bench.measure.machine import commit, versions
from bench.measure.memory import Peaks


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
    rivals = chosen(metafunc.config.getoption("--rivals"), RIVALS)
    contests = [(name, mode) for name in workloads for mode in WORKLOADS[name].modes]
    entries = [
        (contest, rival)
        for contest in contests
        for rival in field(WORKLOADS[contest[0]])
        if rival in rivals
    ]
    ids = ["-".join((*contest, rival)) for contest, rival in entries]
    metafunc.parametrize(
        ("contest", "rival"), entries, indirect=["contest"], ids=ids, scope="module"
    )


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

    option = request.config.getoption
    workload = sized(name, option("--scale"), option("--small"))
    benchmark.extra_info.update(
        workload=name,
        mode=mode,
        rival=rival,
        ratio=outcome.ratio,
        peak_extra_bytes=peaks.get(f"{name}/{mode}/{rival}"),
        error_share_of_budget=outcome.share,
        foreign_load=outcome.foreign_load,
        flops=workload.flops(mode),
        bytes=workload.bytes(mode, field(workload)[rival].dtype.itemsize),
        threads=option("--threads"),
        versions=versions(),
        commit=commit(),
    )
    assert outcome.share is not None
    assert outcome.share <= 1, (
        f"{rival} is {outcome.share:.3g} times its error budget away from float64 on {name} {mode}"
    )
