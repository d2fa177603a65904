"""Every Triton kernel that the launchers choose, compiled for devices that need not be there.

The launchers run on CPU tensors with the launch itself replaced: what would have been launched is
recorded and compiled. Nothing is executed, so these tests say that the kernels exist, fit, and use
the matrix units; what they compute is tested by the interpreter, and on a GPU.
"""

import re
import subprocess
import tempfile
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

from hyperfast.kernels.triton import launch as launching  # noqa: E402
from tests.support import machine_code  # noqa: E402
from tests.support.launches import (  # noqa: E402
    KINDS,
    TARGETS,
    launches,
    recorded,
    run_network,
)

pytestmark = pytest.mark.skipif(launching.INTERPRETED, reason="the kernels are interpreted")

# Where registers are limited, so that two programs share a multiprocessor: what is in a loop beside
# that which generates weights runs once for every 64 features.
MAY_SPILL = 8
# Three parts of fp32 beside a layer's inputs and sums: of a network in the layer that has the
# fewest outputs; of a single layer in the loops of biases alone, on vector units.
PARTS_MAY_SPILL = {"_hyper_mlp": 4}
BIASES_MAY_SPILL = 2
PRODUCTS = "_contract", "_outer", "_hyper_mlp"
MATRIX_UNIT = re.compile(r"wgmma\.mma_async|mma\.sync\.aligned\.m\d+n\d+k\d+|v_mfma")


class Binary(NamedTuple):
    """What the compiler made of one launch."""

    launch: str
    kernel: str
    shared: int
    spilled: int  # accesses to local memory: on NVIDIA's, of an innermost loop on the matrix unit
    spilled_beside: int  # the same, of another loop
    matrix_unit: bool
    parts: int  # of an operand that is multiplied


def spilled_on_cuda(cubin):
    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        code = machine_code.disassembled(file.name)
    spilled = [0, 0]
    for loop in machine_code.loops(code):
        beside = not loop.products
        spilled[beside] = max(spilled[beside], loop.local)
    return spilled


def spilled_on_amd(assembly):
    return 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1]), 0


def made_of(launch, target):
    gpu = TARGETS[target].gpu
    made = launch.compile(gpu)
    cuda = gpu.backend == "cuda"
    return Binary(
        str(launch),
        launch.kernel.__name__,
        made.metadata.shared,
        *(spilled_on_cuda(made.asm["cubin"]) if cuda else spilled_on_amd(made.asm["amdgcn"])),
        MATRIX_UNIT.search(made.asm["ptx" if cuda else "amdgcn"]) is not None,
        dict(launch.constants).get("PARTS", 0),
    )


@cache
def compiled(target, kind):
    return [made_of(launch, target) for launch in launches(kind, target)]


# Of "medium" what is not split is as in "high", and what is split as in bf16: one device will do.
JOBS = [(t, k) for t, k in product(TARGETS, KINDS) if k != "medium" or t == "sm_90"]
every_job = pytest.mark.parametrize(("target", "kind"), JOBS)


@every_job
def test_every_kernel_fits(target, kind):
    binaries = compiled(target, kind)
    made = {b.kernel for b in binaries}
    assert {"_contract", "_outer", "_task_linear", "_task_outer"} <= made
    if kind != "fp16":
        assert {"_hyper_mlp", "_task_mlp"} <= made
    for b in binaries:
        assert b.shared <= TARGETS[target].shared, b
        # Of IEEE fp32 ptxas spills one register rather than give up a program a multiprocessor.
        may, beside = MAY_SPILL if "reg=" in b.launch else 0, int(kind == "fp32")
        if b.parts > 1:
            may, beside = PARTS_MAY_SPILL.get(b.kernel, 0), BIASES_MAY_SPILL
        assert b.spilled <= may, b
        assert b.spilled_beside <= max(may, beside), b


@every_job
def test_products_run_on_matrix_units(target, kind):
    """Not those of IEEE fp32: NVIDIA's units have no such format, and an MI300's are as fast as its
    vector units. Where there is much to multiply, fp32 comes in parts. The two products of rows
    with few are sums of outer products, or bound by memory."""
    products = [b for b in compiled(target, kind) if b.kernel in PRODUCTS]
    on_matrix_units = {(b.kernel, b.parts) for b in products if b.matrix_unit}
    if kind == "fp32":
        assert on_matrix_units >= {(name, 3) for name in PRODUCTS}
        others = [b for b in compiled("sm_90", kind) if b.kernel not in PRODUCTS or b.parts == 1]
        assert {b.kernel for b in others} >= {"_contract", "_outer", "_task_linear"}
        assert not any(b.matrix_unit for b in others)
        return
    for b in products:
        assert b.matrix_unit, b
    if kind == "high":  # little work is TF32, and so is the gradient of the head
        wanted = {("_contract", 1), ("_contract", 2), ("_hyper_mlp", 2), ("_outer", 1)}
        assert on_matrix_units == wanted


def test_a_sine_does_not_spill(tmp_path):
    """Its reduction of large arguments has an array in local memory, which counts as stack."""
    sizes = (2, 64, 64, 1), "sin:30.0,sin:30.0,identity"
    made = recorded("bf16", "sm_90", lambda: run_network(torch.bfloat16, 40000, *sizes, False))
    (launch,) = [one for one in made if one.kernel.__name__ == "_hyper_mlp"]
    source = tmp_path / "sine.ptx"
    source.write_text(launch.compile(TARGETS["sm_90"].gpu).asm["ptx"])
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"
    command = [tool, "-v", "--gpu-name=sm_90a", "-o", tmp_path / "cubin", source]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in told
