"""Mixed rows in blocks of the tasks that they name."""

import pytest
import torch

from hyperfast.kernels.rows import blocks


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("count", [0, 1, 63])
def test_every_row_is_in_the_block_of_its_task(count, size):
    rows = torch.randint(10, (count,)) ** 2
    found = list(blocks(rows, size))
    values = torch.cat([v for v, _, _ in found]) if found else rows
    assert torch.equal(values, rows.unique())
    assert all(len(v) <= size for v, _, _ in found)
    where = torch.cat([w for _, w, _ in found]) if found else rows
    assert torch.equal(where.sort().values, torch.arange(count))  # each once
    for values, where, local in found:
        assert torch.equal(rows[where], values[local])


def test_no_block_is_empty():
    assert [v.tolist() for v, _, _ in blocks(torch.tensor([5, 5, 9, 7]), 2)] == [[5, 7], [9]]
