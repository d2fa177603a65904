"""Ids and keys of tasks as a tensor, for snapshots and logs."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from hyperfast.bank.file import raw
from hyperfast.bank.table import Named


def pack(names: Named) -> Tensor:
    """Ids and keys as JSON, in a tensor."""
    return torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)


def unpack(packed: Tensor, ids: set[int]) -> Named:
    """What :func:`pack` packed; raises ValueError or TypeError for anything else, or for a key of
    a task that is not in ``ids``."""
    names = [(task, key) for task, key in json.loads(bytes(raw(packed)))]
    if not all(task in ids and type(key) in (str, int) for task, key in names):
        raise ValueError("its keys are not str or int, or not of its tasks")
    if not len(names) == len({task for task, _ in names}) == len({key for _, key in names}):
        raise ValueError("its keys are not different")
    return names
