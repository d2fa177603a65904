"""What a GPU would run, read from machine code: the loops of the layers' kernels multiply on its
matrix units, from shared memory, and do little beside."""

import pytest

pytest.importorskip("triton")

from hyperfast.kernels.triton import launch as launching
from tests.support.launches import NETWORKS
from tests.support.machine_code import assemble, assemblers, layers, loops

pytestmark = pytest.mark.skipif(launching.INTERPRETED, reason="the kernels are interpreted")

FEW = (4096, 1, 128, 128, 64, False), (64, 1, 8, 32, 64, False)
CHOSEN = [
    *(("sm_90", launch) for launch in layers("bf16", "sm_90", FEW, (NETWORKS[0], NETWORKS[3]))),
    *(("sm_90", launch) for launch in layers("tf32", "sm_90", FEW[:1], ())),
    *(("sm_80", launch) for launch in layers("bf16", "sm_80", FEW[:1], ())),
]


def wide(launch):
    """Whether a warp group multiplies: it takes 64 rows."""
    tile = dict(launch.constants)
    return tile.get("BM", tile.get("BC")) >= 64


@pytest.mark.parametrize("version", assemblers())
@pytest.mark.parametrize(("target", "launch"), CHOSEN, ids=str)
def test_loops(target, launch, version):
    code, _ = assemble(launch, target, assemblers()[version])
    unit = "HGMMA" if target == "sm_90" and wide(launch) else "HMMA"
    found = [loop for loop in loops(code) if loop.products]
    assert found
    for loop in found:
        assert {name for name, _ in loop.products} == {unit}
        if unit == "HGMMA":  # whose left operand in registers an assembler may overwrite
            assert {left for _, left in loop.products} == {"g"}  # gdesc: of shared memory
            # ptxas may wait for every single one, where registers do not suffice for more
            assert 2 * loop.steps <= len(loop.products)
        assert loop.count("BAR") <= 8  # sums of narrow tiles change hands more often
        if loop.generates:  # of 128 registers a few addresses are kept in local memory
            assert loop.local <= 4


@pytest.mark.parametrize("version", assemblers())
def test_what_bounds_the_loops_of_wide_layers(version):
    """Two programs share a multiprocessor: while one multiplies, the other issues instructions, for
    no longer than that; in a network, whose products are half as wide, for a fifth longer."""
    for launch in layers("bf16", "sm_90", FEW[:1], NETWORKS[:1]):
        if launch.kernel.__name__ == "_outer":
            continue
        code, registers = assemble(launch, "sm_90", assemblers()[version])
        loop = max(loops(code), key=lambda one: one.count("FFMA"))
        assert registers <= 128
        assert loop.count("BAR") == 2  # a tile has come; sums change hands
        longer = 1.2 if launch.kernel.__name__ == "_hyper_mlp" else 1
        assert len(loop.code) < longer * loop.clocks("sm_90"), launch
