"""Imports run downwards: from room to room, and in a circle nowhere, be it for types alone."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Rooms, the highest first; those of one line do not look down on each other. A dot is the package's
# face, its __init__. It shows what is below it; recipes use it as any user does, and are above.
ORDER = {
    "hyperfast": "__main__ | recipes | . info | server | distributed | nets | bank | nn"
    "| functional | ops | kernels | plans | layout activations checks",
    "bench": "run | conftest test_speed serve gpu | show | measure | catalog | rivals | problem"
    "| real | workloads absent | .",
}


def modules(package):
    """Dotted name -> its file, of all modules of a package."""
    files = (path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py"))
    return {".".join(f.with_suffix("").parts).removesuffix(".__init__"): ROOT / f for f in files}


def imported(file, known):
    """The modules among ``known`` that a file names, also within functions and for types."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} has a relative import"
            # What is no module itself is taken from the module that it is imported from.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from {n if n in known else node.module for n in names} & known.keys()
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & known.keys()


def edges(package):
    known = modules(package)
    return {name: set(imported(file, known)) for name, file in known.items()}


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_downwards(package):
    floors = enumerate(ORDER[package].split("|"))
    floor = {room: -number for number, rooms in floors for room in rooms.split()}
    room = lambda module: floor[(module + "..").split(".")[1] or "."]  # noqa: E731
    upwards = [f"{a} -> {b}" for a, of in edges(package).items() for b in of if room(b) > room(a)]
    assert not sorted(upwards), "\n".join(sorted(upwards))


@pytest.mark.parametrize("package", ORDER)
def test_no_cycle(package):
    try:
        TopologicalSorter(edges(package)).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("package", ORDER)
def test_a_package_names_no_other_above_it(package):
    """The library knows neither its benchmarks nor its tests; the benchmarks do not know tests."""
    others = modules("tests") | (modules("bench") if package == "hyperfast" else {})
    assert not [f for f in modules(package).values() for _ in imported(f, others)]
