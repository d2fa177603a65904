"""A bank and its log: changes are written to it, and repeated from it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from hyperfast.bank.contents import to_ids
from hyperfast.bank.file import BankFileError
from hyperfast.bank.keys import pack, unpack
from hyperfast.bank.log import Log, Record, records
from hyperfast.bank.table import Change, fits

if TYPE_CHECKING:
    from hyperfast.bank import TaskBank


def log_path(path: Path) -> Path:
    return path.with_name(path.name + ".log")


def record(bank: TaskBank, op: str, change: Change, z: Tensor | None) -> None:
    """Acknowledges a change: when this returns, the log holds it."""
    if bank._log is not None:
        content = {"ids": change.ids}
        if op != "remove" and bank.max_bytes is None:
            rows = bank._table.weights.take(change.rows)
            content |= zip(bank._format.columns, rows, strict=True)
        if z is not None:
            content["latents"] = z
        if change.names:
            content["keys"] = pack(change.names)
        bank._log.append(bank._sequence + 1, {"op": op}, content)
    bank._sequence += 1


def replay(bank: TaskBank, file: BinaryIO, source: str) -> int:
    """Repeats what a log holds beyond the snapshot; returns where its last record ends."""
    end, last = 0, 0
    for entry in records(file, source):
        try:
            if end == 0:
                if entry.meta["op"] != "begin" or entry.sequence > bank._sequence:
                    raise ValueError("it begins in the middle")
                if entry.meta["bank"] != bank._name:
                    raise ValueError("it belongs to another bank; if it is old, delete it")
            elif entry.sequence != last + 1:
                raise ValueError("a record is missing")
            elif entry.sequence > bank._sequence:
                _repeat(bank, entry)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise BankFileError(f"{source} does not fit its bank: {error}") from error
        end, last = entry.end, entry.sequence
    return end if last == bank._sequence else 0


def _repeat(bank: TaskBank, entry: Record) -> None:
    """One change of a log, which is not trusted to fit."""
    op, tensors, table = entry.meta["op"], entry.tensors, bank._table
    ids = to_ids(tensors["ids"], bank.device, distinct=True)
    if op == "add" and not torch.equal(ids, table.fresh_ids(len(ids))):
        raise ValueError("its ids are not the next")
    if op != "add":
        table.find(ids)
    if op == "remove":
        table.remove(ids)
    else:
        columns, z = None, None
        if bank.max_bytes is None:
            columns = tuple(tensors[name] for name in bank._format.columns)
            fits(table.weights.columns, columns, len(ids))
        if (columns is None or "latents" in tensors) and table.latents is not None:
            z = tensors["latents"]
            fits(table.latents.columns, (z,), len(ids))
        names = unpack(tensors["keys"], set(ids.tolist())) if "keys" in tensors else []
        if names and not table.keys.keys().isdisjoint(key for _, key in names):
            raise ValueError("its keys are taken")
        if columns is None and z is None:
            raise ValueError("it adds nothing")
        with bank._changing(op, ids, [columns] if columns else None, z, names):
            pass
    bank._sequence = entry.sequence


def resume(bank: TaskBank, log: Log, end: int) -> None:
    """Writes changes to ``log`` from now on, after its record that ends at ``end``."""
    torn = os.fstat(log.file.fileno()).st_size - end
    if end and torn:
        warnings.warn(
            f"{log.path} ended in {torn} bytes of a change that was never acknowledged; "
            "they are cut off",
            stacklevel=3,
        )
    if end:
        log.cut(end)
    else:
        log.own()
        log.begin(bank._name, bank._sequence)
    bank._log = log
