"""The machine code of stored networks in one kernel: where a Hopper's warp group multiplies, both
operands lie in shared memory; an assembler may overwrite what is in registers."""

import pytest
import torch

pytest.importorskip("triton")

from hyperfast.kernels import triton as kernels
from hyperfast.kernels.triton import launch as launching
from hyperfast.layout import Network
from tests.support.launches import recorded
from tests.support.machine_code import PRODUCT, assemble, assemblers

pytestmark = pytest.mark.skipif(launching.INTERPRETED, reason="the kernels are interpreted")


@pytest.mark.parametrize("version", assemblers())
@pytest.mark.parametrize("scaled", [False, True], ids=["floats", "int8"])
@pytest.mark.parametrize("transform", ["", " exp(W)"])
def test_left_operands(transform, scaled, version):
    network = f"64 > 64 b relu{transform}, 64 b relu, 10 b"
    net = Network.parse(network)

    def empty(numel, dtype=torch.bfloat16):
        return torch.empty(1, numel, dtype=dtype).expand(500, -1)

    def run():  # 40 rows a task
        x, ids = torch.empty(20000, 64, dtype=torch.bfloat16), torch.zeros(20000, dtype=torch.int64)
        given = empty(net.numel), None
        if scaled:
            given = empty(net.weight_numel, torch.int8), empty(net.vector_numel)
        kernels.task_mlp(x, *given, ids, network)

    (one,) = [v for v in recorded("bf16", "sm_90", run) if v.kernel.__name__ == "_task_mlp"]
    assert dict(one.constants)["BM"] >= 32
    code, _ = assemble(one, "sm_90", assemblers()[version])
    found = [match for line in code.splitlines() for match in PRODUCT.finditer(line)]
    assert found
    assert all(match[3][0] == "g" for match in found if match[1] == "HGMMA")
