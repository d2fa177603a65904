"""Starts a suite under Triton's interpreter, which is chosen by the environment before the first
import: hence a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

TESTS = Path(__file__).parents[1] / "kernels" / "triton"


def version(package):
    return tuple(map(int, package.__version__.split(".")[:2]))


def interpret(suite):
    triton = pytest.importorskip("triton")
    if version(triton) < (3, 7) and version(numpy) >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 needs NumPy before 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / suite)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
