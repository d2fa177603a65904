"""What a bank launches beyond what ``test_compile.py`` lists, compiled for devices that need not be
there: look-ups, parts of sums, and the largest networks whose weights stay in registers."""

import pytest
import torch

pytest.importorskip("triton")

from hyperfast.kernels.triton import launch as launching
from hyperfast.kernels.triton import look_up, task_linear_grad_weight
from tests.kernels.triton.test_compile import made_of
from tests.support.launches import KINDS, TARGETS, recorded, run_stored

pytestmark = pytest.mark.skipif(launching.INTERPRETED, reason="the kernels are interpreted")

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


# Each kind, and each device.
JOBS = [*((target, "bf16") for target in TARGETS), ("sm_90", "fp32"), ("sm_90", "fp64")]


@pytest.mark.parametrize(("target", "kind"), JOBS)
def test_what_a_bank_launches_fits(target, kind):
    made = recorded(kind, target, lambda: work(kind))
    assert {"_look_up", "_task_mlp", "_task_parts", "_task_outer"} <= {
        launch.kernel.__name__ for launch in made
    }
    stretches = [dict(launch.constants).get("ROWS") for launch in made]
    assert {1, 32} <= set(stretches)
    for launch in made:
        binary = made_of(launch, target)
        assert binary.shared <= TARGETS[target].shared, launch
        # ptxas spills up to four registers rather than give up a program a multiprocessor.
        assert max(binary.spilled, binary.spilled_beside) <= 16, launch
