"""What the README says of sizes follows from the code."""

from pathlib import Path

import pytest
import torch

from hyperfast import HyperNet, TaskBank
from hyperfast.bank.formats import format_of

README = (Path(__file__).parents[2] / "README.md").read_text()
SIZES, Z_DIM = (64, 64, 10), 16


@pytest.fixture(scope="module")
def bank():
    return TaskBank.from_latents(HyperNet(Z_DIM, *SIZES), torch.randn(1000, Z_DIM))


def test_table(bank):
    costs = bank.explain()
    stored = {
        "fp32": costs.keep_bytes,
        "bf16, fp16": format_of(bank.spec, torch.bfloat16).task_bytes,
        "int8": format_of(bank.spec, torch.int8).task_bytes,
        "latent of 16 fp32, weights generated when used": costs.regenerate_bytes,
    }
    for name, size in stored.items():
        fit, giga = f"{64e9 / size / 1e6:,.2f}".removesuffix(".00"), size * 1e9 / 1e12
        assert f"| {name} | {size:,} | {fit} million | {giga:.3g} TB |" in README


def test_prose(bank):
    size, int8 = bank.explain().keep_bytes, format_of(bank.spec, torch.int8).task_bytes
    assert f"`P` = {bank.spec.numel:,}" in README
    assert int8 == sum(layer.weight_numel + 8 * layer.out_features for layer in bank.spec.layers)
    table = bank.contents.table
    own = table._entries[0].nbytes + table._codes[0].nbytes
    assert f"table adds {own} bytes a task" in README
    keyed = own + 150  # the two dicts and the int of a key, by tracemalloc
    assert f"in int8 are {(int8 + keyed) / 1e3:.1f} TB" in README
    assert f"of {-(-(int8 + keyed) * 10**9 // (512 * 10**9))} machines of 512 GB" in README
    assert f"as latents they are {(4 * Z_DIM + keyed) / 1e3:.2f} TB" in README
    assert f"costs {size:,} bytes of memory traffic in fp32" in README
    assert f"one of 32 rows {size / 32:.0f}." in README
    there, back = 8 + 4 * SIZES[0], 4 * SIZES[-1]
    sentence = f"{there} + {back} = {there + back} in fp32, {size / (there + back):.0f} times less"
    assert sentence in README
    assert f"carries {10e9 / 8 / (there + back) / 1e6:.1f} million such rows" in README
    assert f"int8 holds {size / int8:.1f} times as many" in README


def test_explain(bank):
    assert str(bank.explain()) in README
