"""The tasks of a bank as an ordinary module, for torch.export and what is built on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hyperfast.bank.rows import apply
from hyperfast.bank.table import SLOT

if TYPE_CHECKING:
    from hyperfast.bank import TaskBank


class BankModule(nn.Module):
    """``module(x, task_ids)`` equals ``bank(x, task_ids)`` for the tasks that ``bank`` has now.

    Made by :meth:`TaskBank.module`. Its buffers are the weights ``(n, P)``, in the dtype that the
    bank computes in, and where in them the tasks are.
    """

    weights: Tensor
    codes: Tensor

    def __init__(self, bank: TaskBank):
        super().__init__()
        self.spec = bank.spec
        self.activations = bank._activations
        self.used = nn.ModuleList(a for a in self.activations if a is not None)  # registers them
        with bank._table.write:
            ids = bank.ids()
            self.register_buffer("weights", bank.weights(ids))
        # As in the bank's table, ``code ^ id`` is the row of a task, and no row for any other id:
        # of an empty slot, or, by the 0 at the end, of a slot that there is not.
        slots = ids & SLOT
        count = int(slots.max()) + 1 if len(ids) else 0
        codes = torch.arange(count + 1, device=ids.device) ^ SLOT
        codes[slots] = (ids & ~SLOT) | (torch.arange(len(ids), device=ids.device) ^ slots)
        codes[count] = 0
        self.register_buffer("codes", codes)

    def forward(self, x: Tensor, task_ids: Tensor) -> Tensor:
        """As :meth:`TaskBank.__call__`.

        Raises:
            ValueError, TypeError: shapes or dtypes that disagree.
            IndexError: an id that was not in the bank.
        """
        slots = (task_ids & SLOT).clamp(max=len(self.codes) - 1)
        rows = self.codes.index_select(0, slots) ^ task_ids
        y = apply(self.spec, self.activations, (self.weights,), x.to(self.weights.dtype), rows)
        return y.to(x.dtype)
