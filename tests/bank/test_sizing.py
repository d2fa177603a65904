"""The sizes in the banks' page follow from the code: its table and its example line by line, and
the numbers of its text."""

import re
from pathlib import Path

import pytest
import torch

import hyperfast.bank
from hyperfast import HyperNet, TaskBank
from hyperfast.bank.formats import format_of

PAGE = (Path(hyperfast.bank.__file__).parent / "README.md").read_text()
SIZES, Z_DIM = (64, 64, 10), 16
KEY = 150  # the two dicts and the int of a key, by tracemalloc


@pytest.fixture(scope="module")
def bank():
    return TaskBank.from_latents(HyperNet(Z_DIM, *SIZES), torch.randn(1000, Z_DIM))


def bytes_of(bank, dtype):
    return format_of(bank.spec, dtype).task_bytes


def numbers_under(title):
    """All numbers in the text of a section, up to the next title."""
    text = PAGE[PAGE.index(title) + len(title) :]
    text = re.split(r"\n## |\n\*\*|```", text)[0]
    return {float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text)}


def test_table(bank):
    stored = {
        "fp32": bytes_of(bank, torch.float32),
        "bf16, fp16": bytes_of(bank, torch.bfloat16),
        "int8": bytes_of(bank, torch.int8),
        "latent of 16 fp32": bank.explain().regenerate_bytes,
    }
    for name, size in stored.items():
        fit, giga = f"{64e9 / size / 1e6:,.2f}".removesuffix(".00"), size * 1e9 / 1e12
        assert f"| {name} | {size:,} | {fit} million | {giga:.3g} TB |" in PAGE.splitlines()


def test_numbers_of_the_text(bank):
    size, int8 = bytes_of(bank, torch.float32), bytes_of(bank, torch.int8)
    assert int8 == sum(layer.weight_numel + 8 * layer.out_features for layer in bank.spec.layers)
    table = bank.contents.table
    own = table._entries[0].nbytes + table._codes[0].nbytes
    in_all = (int8 + own + KEY) / 1e3  # TB of 10^9 tasks
    machines = -(-(int8 + own + KEY) * 10**9 // (512 * 10**9))
    latents = (4 * Z_DIM + own + KEY) / 1e3
    large = numbers_under("## How large")
    assert large >= {bank.spec.numel, own, KEY, round(in_all, 1), machines, round(latents, 2)}
    there, back = 8 + 4 * SIZES[0], 4 * SIZES[-1]
    rows = {size, round(size / 32), there, back, there + back, round(size / (there + back))}
    link = round(10e9 / 8 / (there + back) / 1e6, 1)
    assert numbers_under("**What a row costs.**") >= rows | {link}
    assert numbers_under("**Keep or regenerate.**") >= {size, round(size / int8, 1)}


def test_example(bank):
    assert str(bank.explain()) in PAGE
