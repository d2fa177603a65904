"""The list of recipes."""

import importlib.util
import subprocess
import sys

import pytest

from hyperfast.__main__ import main
from hyperfast.recipes.__main__ import recipes


def test_each_has_its_line():
    found = recipes()
    assert {"continual", "digits", "ensemble", "personal", "two_step"} <= found.keys()
    for name, about in found.items():
        assert about.endswith("."), name  # its docstring begins with one sentence of one line
        assert importlib.util.find_spec(f"hyperfast.recipes.{name}")


@pytest.mark.parametrize("command", [["hyperfast.recipes"], ["hyperfast", "recipes"]])
def test_the_commands(command):
    run = [sys.executable, "-m", *command]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split(maxsplit=1) for line in lines[:-2]] == [*map(list, recipes().items())]
    assert max(map(len, lines)) <= 120


def test_options_that_it_does_not_have():
    with pytest.raises(SystemExit):
        main(["recipes", "--quick"])
