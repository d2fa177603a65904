"""The tasks of a bank as an ordinary module, for torch.export and what is built on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperfast.bank.contents import Contents, check_request, own_activations
from hyperfast.bank.formats import Floats
from hyperfast.bank.table import PLACE, check_known, code_of


class BankModule(nn.Module):
    """``module(x, task_ids)`` equals ``bank(x, task_ids)`` for the tasks that the bank had then.

    Made by :meth:`TaskBank.module`. Its buffers are the weights ``(n, P)``, in the dtype that the
    bank computes in, and where in them the tasks are; activations are copies. It is in eval mode.
    """

    weights: Tensor
    codes: Tensor

    def __init__(self, contents: Contents):
        super().__init__()
        compute = contents.format.compute
        self.spec, self.transform = contents.spec, contents.format.transform
        self.activations = own_activations(contents.activations, compute, contents.device)
        self.used = nn.ModuleList(a for a in self.activations if a is not None)  # registers them
        with contents.table.write:
            ids = contents.table.ids()
            self.register_buffer("weights", contents.weights(ids))
        # As in the bank's table; no row for an id of an empty place, or, by the 0 at the end, of a
        # place that there is not.
        places = ids & PLACE
        count = int(places.max()) + 1 if len(ids) else 0
        codes = torch.arange(count + 1, dtype=torch.int64, device=ids.device) ^ PLACE
        rows = torch.arange(len(ids), dtype=torch.int64, device=ids.device)
        codes[places] = code_of(ids, rows, places)
        codes[count] = 0
        self.register_buffer("codes", codes)
        self.eval()

    def forward(self, x: Tensor, task_ids: Tensor) -> Tensor:
        """As :meth:`TaskBank.__call__`.

        Raises:
            ValueError, TypeError: shapes or dtypes that disagree.
            IndexError: an id that was not in the bank; an exported program names another number.
        """
        check_request(x, task_ids, self.spec, self.weights.device)
        places = (task_ids & PLACE).clamp(max=len(self.codes) - 1)
        index = self.codes.index_select(0, places) ^ task_ids
        format = Floats(self.spec, self.transform, self.weights.dtype)
        try:
            y = format.apply(self.activations, (self.weights,), x.to(self.weights.dtype), index)
        except IndexError:  # of another number; to ask before would take as long as the networks
            check_known(task_ids, (index >= 0) & (index < len(self.weights)))
            raise
        return y.to(x.dtype)
