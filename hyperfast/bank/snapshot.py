"""A bank and its snapshot: the file that holds all of it, and the bank that is made of one."""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hyperfast.activations import KNOWN, resolve
from hyperfast.bank.file import Array, BankFileError, Snapshot, raw, write_snapshot
from hyperfast.bank.keys import pack, unpack
from hyperfast.bank.log import Log
from hyperfast.bank.replay import log_path
from hyperfast.bank.rows import Guard, Store
from hyperfast.bank.table import LATENT, ROW, Named
from hyperfast.layout import MLPSpec
from hyperfast.nn.copies import clone
from hyperfast.nn.hypernet import HyperNet
from hyperfast.nn.target import TargetNet

if TYPE_CHECKING:
    from hyperfast.bank import TaskBank


def save(bank: TaskBank, path: Path) -> None:
    """See :meth:`hyperfast.TaskBank.save`."""
    with bank._saving, ExitStack() as stack:
        log = bank._log if bank._log is not None and not bank._log.file.closed else None
        own = log is not None and log.path == log_path(path)
        stale = None
        if not own and log_path(path).exists():  # it continues the file that is replaced
            stale = Log(log_path(path))
            stack.callback(stale.close)
        with bank._table.write:
            meta = _meta(bank) if own else _meta(bank) | {"bank": uuid.uuid4().hex}
            end = log.end if log is not None else 0
            entries, names = stack.enter_context(bank._table.frozen())
        if bank.max_bytes is not None:
            entries[:, ROW] = -1
        content: dict[str, tuple[Array, Iterable[Tensor]]] = dict(
            _pieces(bank._table.weights, bank._format.columns, entries[:, ROW])
        )
        if bank._table.latents is not None:
            content |= _pieces(bank._table.latents, ["latents"], entries[:, LATENT])
        content["table"] = Array(entries.dtype, tuple(entries.shape)), [entries]
        if names:
            packed = pack(names)
            content["keys"] = Array(packed.dtype, tuple(packed.shape)), [packed]
        write_snapshot(path, meta, content)
        if stale is not None:
            stale.path.unlink()
        if own and log is not None:
            with bank._table.write:
                log.trim(end, bank._name, meta["sequence"])


def load(
    cls: type[TaskBank], path: Path, hyper: HyperNet | None, max_bytes: int | None
) -> TaskBank:
    """The bank that a snapshot holds."""
    snapshot = Snapshot(path)
    meta, tensors, guards = snapshot.meta, snapshot.tensors, snapshot.guards
    if meta.get("max_bytes") is None and max_bytes is not None:
        raise ValueError("max_bytes must be None for a bank that was saved without a budget")
    try:
        guards["table"](None)
        latents = tensors.pop("latents", None)
        packed = tensors.pop("keys", None)
        spec, layers = MLPSpec(meta["sizes"], meta["bias"]), meta["activations"]
        bank = cls(
            spec,
            TargetNet(layers if layers[-1] is not None else layers[:-1]),
            getattr(torch, meta["dtype"]),
            torch.device("cpu"),
            latent=None if latents is None else (latents.shape[1], latents.dtype),
            max_bytes=meta["max_bytes"] if max_bytes is None else max_bytes,
        )
        if type(meta["sequence"]) is not int or not 0 <= meta["sequence"] < 1 << 62:
            raise ValueError("its sequence number")
        bank._name, bank._sequence, bank._mark = meta["bank"], meta["sequence"], meta["hyper"]
        columns = tuple(tensors.pop(name) for name in bank._format.columns)
        keys = None if packed is None else partial(_read_keys, packed, guards["keys"], path)
        bank._table.adopt(tensors.pop("table"), keys, columns, latents, guards)
        if tensors:
            raise ValueError(f"it holds {sorted(tensors)} as well")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BankFileError(f"{path} is not a bank that can be read: {error}") from error
    if hyper is not None:
        _attach(bank, hyper, path)
    elif bank.max_bytes is not None:
        raise ValueError(f"hyper must be given: {path} holds latents, not weights")
    return bank


def _attach(bank: TaskBank, hyper: HyperNet, path: Path) -> None:
    """Takes ``hyper`` as the hypernetwork of an opened bank."""
    if not isinstance(hyper, HyperNet):
        raise TypeError(f"hyper must be a HyperNet, got {type(hyper).__name__}")
    if hyper.spec != bank.spec or hyper.device != bank.device:
        raise ValueError(f"hyper must generate {bank.spec} on {bank.device}, got {hyper!r}")
    latent = (hyper.z_dim, hyper.dtype)
    known = bank._table.latents.columns[0] if bank._table.latents is not None else latent
    if bank._mark not in (None, mark(hyper)) or known != latent:
        raise BankFileError(f"{path} was made with another hypernetwork than hyper")
    bank.hyper, bank._mark = clone(hyper).eval(), mark(hyper)
    bank._table.latents = bank._table.latents or Store([latent], bank.device)


def _meta(bank: TaskBank) -> dict[str, Any]:
    return {
        "bank": bank._name,
        "sequence": bank._sequence,
        "sizes": list(bank.spec.sizes),
        "bias": bank.spec.bias,
        "activations": [_activation_name(a) for a in bank._activations],
        "dtype": str(bank.dtype).removeprefix("torch."),
        "hyper": bank._mark,
        "max_bytes": bank.max_bytes,
    }


def mark(hyper: HyperNet) -> str:
    """A checksum of the parameters of ``hyper``."""
    total = 0
    for value in tree_leaves(hyper.state_dict()):
        if isinstance(value, Tensor):  # quantised layers keep other values, and tuples
            value = value.dequantize() if value.is_quantized else value
            total = zlib.crc32(raw(value.detach().cpu().contiguous()), total)
    return f"{total:08x}"


def _activation_name(activation: nn.Module | None) -> str | None:
    """The name by which a file knows ``activation``."""
    if activation is None:
        return None
    for name, known in KNOWN.items():
        if type(activation) is known.module and repr(activation) == repr(resolve(name)):
            return name
    raise ValueError(f"a file can hold the activations {sorted(KNOWN)}, and not {activation}")


def _read_keys(packed: Tensor, guard: Guard, path: Path, ids: set[int]) -> Named:
    guard(None)
    try:
        return unpack(packed, ids)
    except (ValueError, TypeError, RecursionError) as error:
        raise BankFileError(f"the keys of {path} cannot be read: {error}") from error


def _pieces(
    store: Store, names: Iterable[str], rows: Tensor
) -> Iterator[tuple[str, tuple[Array, Iterable[Tensor]]]]:
    """What ``rows`` (-1: none) of a store hold, for a file, 4 MB at a time. Changes ``rows`` to the
    rows of the file."""
    held = rows >= 0
    kept = rows[held]
    rows[held] = torch.arange(len(kept), device=rows.device)
    for n, (name, (width, dtype)) in enumerate(zip(names, store.columns, strict=True)):
        array = Array(dtype, (len(kept), width))
        yield name, (array, map(partial(store.column, n), kept.split(64 * array.step)))
