"""What a GPU would run, read from machine code: the loops of the layers' kernels multiply on its
matrix units, from shared memory, and do little beside."""

import pytest

pytest.importorskip("triton")

from hyperfast.kernels.triton import launch as launching
from tests.support.launches import NETWORKS
from tests.support.machine_code import RATE, assemble, assemblers, layers, loops

pytestmark = pytest.mark.skipif(launching.INTERPRETED, reason="the kernels are interpreted")

FEW = (20000, 1, 128, 128, 64, False), (64, 1, 8, 32, 64, False)
CHOSEN = [
    *(("sm_90", launch) for launch in layers("bf16", "sm_90", FEW, (NETWORKS[0], NETWORKS[3]))),
    *(("sm_80", launch) for launch in layers("bf16", "sm_80", FEW[:1], ())),
]
# fp32 in three parts and in two; a network, too.
IN_PARTS = [
    *(("fp32", "sm_90", launch) for launch in layers("fp32", "sm_90", FEW[:1], NETWORKS[:1])),
    *(("fp32", "sm_80", launch) for launch in layers("fp32", "sm_80", FEW[:1], ())),
    *(("high", "sm_90", launch) for launch in layers("high", "sm_90", FEW[:1], ())),
]
IN_PARTS = list({str(one): one for one in IN_PARTS if dict(one[2].constants)["PARTS"] > 1}.values())


def wide(launch):
    """Whether a warp group multiplies: it takes 64 rows."""
    tile = dict(launch.constants)
    return tile.get("BM", tile.get("BC")) >= 64


@pytest.mark.parametrize("version", assemblers())
@pytest.mark.parametrize(("target", "launch"), [*CHOSEN, *(one[1:] for one in IN_PARTS)], ids=str)
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
        if dict(launch.constants)["PARTS"] > 1:
            assert not loop.local
        elif loop.generates:  # of 128 registers a few addresses are kept in local memory
            assert loop.local <= 4


@pytest.mark.parametrize("version", assemblers())
@pytest.mark.parametrize(("kind", "target", "launch"), IN_PARTS, ids=str)
def test_products_of_parts(kind, target, launch, version):
    """Six of three parts, three of two, each once: the matrix unit takes so many times as long as
    for one product of the tile."""
    code, _ = assemble(launch, target, assemblers()[version])
    loop = max(loops(code), key=lambda one: one.clocks(target))
    tile, warps = dict(launch.constants), dict(launch.options)["num_warps"]
    if launch.kernel.__name__ == "_outer":
        rows, columns, depth = tile["BC"], tile["BA"] * tile["BB"], tile["BR"]
    else:
        network = launch.kernel.__name__ == "_hyper_mlp"
        groups = tile["GROUPS"][0] if network else tile["G"]
        inputs = tile["TILES"][0] if network else tile["BJ"]
        rows, columns, depth = tile["BM"], groups * inputs, tile["BK"]
    once = rows * columns * depth / warps / RATE[target]
    assert loop.clocks(target) == {"fp32": 6, "high": 3}[kind] * once
    assert not any("TF32" in line for line in loop.code)


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
