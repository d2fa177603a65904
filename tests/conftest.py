import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and so do what they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from hyperfast.plans.cpu import EXTENSION


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def dynamo():
    """For tests that compile: no graph of another test is reused, nor left to one."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo
    torch._dynamo.reset()


@pytest.fixture
def nan_poison():
    """``torch.empty`` is filled with NaN, and so are results and scratch memory of the C++ ops: an
    element which is never written shows."""
    if EXTENSION is not None:
        EXTENSION.poison_memory(True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    if EXTENSION is not None:
        EXTENSION.poison_memory(False)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
