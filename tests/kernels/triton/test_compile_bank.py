"""What a bank launches beyond what ``test_compile.py`` lists, compiled for devices that need not be
there: look-ups, parts of sums, and the largest networks whose weights stay in registers."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from hyperfast.kernels.triton import launch as launching
from hyperfast.kernels.triton import look_up, task_linear_grad_weight
from tests.kernels.triton.test_compile import amd_resources, cuda_resources
from tests.support.launches import KINDS, TARGETS, TYPES, recorded, run_stored

pytestmark = pytest.mark.skipif(launching.INTERPRETED, reason="the kernels are interpreted")

TYPES[torch.bool] = "i1"
WIDEST = "64 > 64 b relu, 64 b relu, 64 b relu, 64 b"
NARROW = "5 > 7 b relu, 3 b"


def work(kind):
    dtype = KINDS[kind]
    ids = torch.zeros(4096, dtype=torch.int64)
    fault = torch.zeros(1, dtype=torch.int64)
    look_up.look_up(ids, torch.zeros(64, dtype=torch.int64), 64, fault)
    for rows in (64, 20000):  # so few that they are not sorted, and many
        run_stored(dtype, rows, WIDEST)
    run_stored(dtype, 64, NARROW)
    for ins in (1, 64):
        grad, x = torch.empty(4096, 64, dtype=dtype), torch.empty(4096, ins, dtype=dtype)
        task_linear_grad_weight(grad, x, ids, 16)


def compile_all(target, kind, directory):
    device = TARGETS[target]
    found = []
    for n, launch in enumerate(recorded(kind, target, lambda: work(kind))):
        made = launch.compile(device.gpu)
        if device.gpu.backend == "cuda":
            _, spilled = cuda_resources(made.asm["cubin"], Path(directory) / f"{target}{kind}{n}")
        else:
            _, spilled = amd_resources(made.asm["amdgcn"])
        rows = dict(launch.constants).get("ROWS")
        found.append((launch.kernel.__name__, rows, made.metadata.shared, spilled))
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    directory = tmp_path_factory.mktemp("binaries")
    jobs = [(target, kind) for target in TARGETS for kind in ("bf16", "fp32", "fp64")]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        made = {job: pool.submit(compile_all, *job, directory) for job in jobs}
        return {job: future.result() for job, future in made.items()}


@pytest.mark.parametrize("kind", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("target", TARGETS)
def test_what_a_bank_launches_fits(compiled, target, kind):
    made = compiled[target, kind]
    names = {name for name, *_ in made}
    assert {"_look_up", "_task_mlp", "_task_parts", "_task_outer"} <= names
    stretches = {rows for name, rows, *_ in made if name == "_task_mlp"}
    assert {1, 32} <= stretches
    for name, rows, shared, spilled in made:
        assert shared <= TARGETS[target].shared, (name, rows)
        # ptxas spills up to four registers rather than give up a program a multiprocessor.
        assert spilled <= 16, (name, rows)
