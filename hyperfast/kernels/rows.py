"""Mixed rows by the task they name."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


def blocks(rows: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The distinct values of ``rows (R,)``, ``size`` at a time: ``(values, where, local)`` with
    ``rows[where] == values[local]``."""
    values, inverse = torch.unique(rows, return_inverse=True)
    ordered, order = inverse.sort()
    starts = torch.arange(0, len(values) + size, size, device=rows.device)
    edges = torch.searchsorted(ordered, starts).tolist()
    for n, (first, last) in enumerate(pairwise(edges)):
        yield values[n * size : (n + 1) * size], order[first:last], ordered[first:last] - n * size
