"""What is given to a bank, checked and brought into the form in which it is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from hyperfast import checks
from hyperfast.bank.rows import Columns
from hyperfast.layout import MLPSpec

if TYPE_CHECKING:
    from hyperfast.bank import TaskBank

Ids: TypeAlias = Tensor | Sequence[int] | int
Weights: TypeAlias = Tensor | Sequence[Tensor]

# Elements of the weights that are formed at once when tasks are added: 16 MB in float32.
STEP = 1 << 22


def to_ids(ids: Ids, device: torch.device, distinct: bool = False) -> Tensor:
    """``ids`` as a tensor ``(n,)`` on ``device``, the bank's."""
    if not isinstance(ids, Tensor):
        listed = ids if isinstance(ids, Sequence) and not isinstance(ids, str) else [ids]
        for value in listed:
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(
                    f"ids must be ints or an int64 tensor, got {value!r}; "
                    "bank.ids(keys) gives the ids of keys"
                )
        ids = torch.tensor(listed, dtype=torch.int64)
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if ids.ndim != 1:
        raise ValueError(f"ids must have shape (n,), got {checks.shape(ids)}")
    if distinct and len(ids.unique()) < len(ids):
        raise ValueError("ids must be different from each other")
    return ids.to(device)


def to_flat(spec: MLPSpec, weights: Weights) -> Tensor:
    """``weights`` as one tensor ``(n, P)``."""
    flat = (weights if isinstance(weights, Tensor) else spec.flatten(weights)).detach()
    if flat.ndim != 2 or flat.shape[1] != spec.numel:
        raise ValueError(f"weights must have shape (n, {spec.numel}), got {checks.shape(flat)}")
    if not flat.is_floating_point():
        raise TypeError(f"weights must be floating-point, got {flat.dtype}")
    return flat


def to_columns(
    bank: TaskBank, z: Tensor | None, weights: Weights | None
) -> tuple[int, Tensor | None, Iterator[Columns] | None]:
    """How many tasks, their latents, and their columns, a block at a time."""
    if (z is None) == (weights is None):
        raise TypeError("one of z and weights must be given, and not both")
    size = max(1, STEP // bank.spec.numel)
    if weights is not None:
        if bank.max_bytes is not None:
            raise ValueError("weights cannot be given to a bank with a memory budget, only z")
        flat = to_flat(bank.spec, weights)
        if flat.device != bank.device:
            raise ValueError(f"weights must be on the device of the bank, {bank.device}")
        return len(flat), None, (bank._format.encode(part) for part in flat.split(size))
    if bank.hyper is None:
        raise ValueError("z needs a hypernetwork: give it to TaskBank.open, or give weights")
    z = checks.tensor("z", z).detach()
    if z.ndim != 2 or z.shape[1] != bank.hyper.z_dim:
        raise ValueError(f"z must have shape (n, {bank.hyper.z_dim}), got {checks.shape(z)}")
    dtype, device = bank.hyper.dtype, bank.hyper.device
    if z.dtype != dtype or z.device != device:
        raise TypeError(f"z must be {dtype} on {device}, got {z.dtype}, {z.device}")
    if bank.max_bytes is not None:
        return len(z), z, None
    return len(z), z, (bank._generate(part) for part in z.split(size))
