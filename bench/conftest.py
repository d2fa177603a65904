"""Options of `pytest bench`, and what goes into its JSON besides times."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from bench.catalog import RIVALS, WORKLOADS, field, sized
from bench.measure import ceilings, machine, memory
from bench.measure.contest import Outcome, hold

ABSENT = pytest.StashKey[list[dict[str, str]]]()
MEMORY = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hyperfast bench")
    group.addoption("--workloads", default=",".join(WORKLOADS), help="names, separated by commas")
    group.addoption("--rivals", default=",".join(RIVALS), help="names, separated by commas")
    group.addoption("--rounds", type=int, default=10, help="turns of each rival (10)")
    group.addoption("--threads", type=int, default=machine.cores(), help="for every rival alike")
    group.addoption("--scale", type=int, default=1, help="times as many tasks")
    group.addoption("--small", action="store_true", help="real workloads at the size of a test")


def chosen(option: str, known: Mapping[str, object]) -> list[str]:
    names = [name.strip() for name in option.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise pytest.UsageError(f"unknown: {', '.join(unknown)}; there are: {', '.join(known)}")
    return names


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ABSENT] = []
    config.stash[MEMORY] = "peak resident pages of one call, less what it returns"
    machine.use_threads(config.getoption("--threads"))


@pytest.fixture(scope="session")
def peaks(pytestconfig: pytest.Config) -> memory.Peaks:
    """Weighed before anything is timed, which also leaves compiled kernels in the disk cache."""
    if reason := memory.unavailable():
        pytestconfig.stash[MEMORY] = reason
        return {}
    try:
        return memory.weigh(
            chosen(pytestconfig.getoption("--workloads"), WORKLOADS),
            chosen(pytestconfig.getoption("--rivals"), RIVALS),
            pytestconfig.getoption("--threads"),
            pytestconfig.getoption("--scale"),
            pytestconfig.getoption("--small"),
        )
    except RuntimeError as error:  # times stand without it, and the results say so
        pytestconfig.stash[MEMORY] = str(error)
        return {}


@pytest.fixture(scope="module")
def contest(request: pytest.FixtureRequest, peaks: memory.Peaks) -> dict[str, Outcome]:
    """The whole race of one (workload, mode), held when the first of its tests asks for it."""
    workload, mode = request.param
    config = request.config
    scaled = sized(workload, config.getoption("--scale"), config.getoption("--small"))
    wanted = chosen(config.getoption("--rivals"), RIVALS)
    rivals = [rival for name, rival in field(scaled).items() if name in wanted]
    return hold(scaled, mode, rivals, config.getoption("--rounds"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one race follow one another: pytest sorts them by rivals, too, and would hold a race
    anew for every few of them."""

    def race(item: pytest.Item) -> tuple[str, ...]:
        spec = getattr(item, "callspec", None)
        return spec.params.get("contest", ()) if spec else ()

    items.sort(key=race)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, object]) -> None:
    output_json["hyperfast"] = {
        **machine.circumstances(config.getoption("--threads")),
        "scale": config.getoption("--scale"),
        "small": config.getoption("--small"),
        "rounds": config.getoption("--rounds"),
        "ceilings": ceilings.measure(config.getoption("--threads")),
        "memory": config.stash[MEMORY],
        "absent": config.stash[ABSENT],
    }
