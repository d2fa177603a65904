"""Contents and the file that holds all of them, the snapshot, with the log that continues it."""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperfast.activations import KNOWN, named
from hyperfast.bank.contents import Contents, mark_of, renumbered
from hyperfast.bank.file import Array, BankFileError, Snapshot, open_regular, write_snapshot
from hyperfast.bank.formats import name_of
from hyperfast.bank.log import Log, log_path, pack_keys, unpack_keys
from hyperfast.bank.rows import Guard, Store
from hyperfast.bank.table import LATENT, SLOT, Named
from hyperfast.layout import MLPSpec, Network
from hyperfast.nn.hypernet import HyperNet
from hyperfast.nn.target import TargetNet


def save(contents: Contents, path: Path, like: Path | None = None) -> None:
    """See :meth:`hyperfast.TaskBank.save`.

    Args:
        like: the file whose mode the new one has; by default the one that it replaces.
    """
    with contents.saving, ExitStack() as stack:
        log = contents.log
        own = log is not None and log.path == log_path(path)
        if own and log is not None:
            log.check_owner()
            own = not log.closed
        stale = None
        if not own and log_path(path).exists():  # it continues the file that is replaced
            stale = Log(log_path(path), path)
            stack.callback(stale.close)
        table, format = contents.table, contents.format
        with table.write:
            meta = _describe(contents)
            if not own:
                meta["bank"] = uuid.uuid4().hex
            end = log.end if log is not None else 0
            entries, keys = stack.enter_context(table.frozen())
        if contents.max_bytes is not None:
            entries[:, SLOT] = -1
        content = dict(_pieces(table.weights, format.columns, renumbered(entries, SLOT)))
        if table.latents is not None:
            content |= _pieces(table.latents, ["latents"], renumbered(entries, LATENT))
        content["table"] = Array(entries.dtype, tuple(entries.shape)), [entries]
        if keys:
            packed = pack_keys(keys)
            content["keys"] = Array(packed.dtype, tuple(packed.shape)), [packed]
        write_snapshot(path, meta, content, like or path)
        if stale is not None:
            stale.path.unlink()
        if own and log is not None:
            with table.write:
                log.trim(end, contents.name, meta["sequence"])


def open_contents(
    path: Path, hyper: HyperNet | None, max_bytes: int | None, *, log: bool, verify: bool
) -> Contents:
    """See :meth:`hyperfast.TaskBank.open`."""
    os.stat(path)  # before a log is made for it
    with ExitStack() as stack, ExitStack() as undo:
        # The log before the snapshot: it is cut only after a newer snapshot is there, so that it
        # begins no later than the one that is opened.
        own = Log(log_path(path), path) if log else None
        if own is not None:
            undo.callback(own.close)
        file = None
        if log_path(path).exists():
            file = stack.enter_context(open_regular(log_path(path)))
        contents = _load(path, hyper, max_bytes)
        if verify:
            contents.table.check()
            contents.table.read_keys()
        end = contents.replay(file, str(log_path(path))) if file is not None else 0
        if own is not None:
            _resume(contents, own, end)
            undo.pop_all()
    return contents


def _resume(contents: Contents, log: Log, end: int) -> None:
    """Writes changes to ``log`` from now on, after its record that ends at ``end``."""
    torn = log.file.size - end
    if end and torn:
        warnings.warn(
            f"{log.path} ended in {torn} bytes of a change that was never acknowledged; "
            "they are cut off",
            stacklevel=4,
        )
    if end:
        log.cut(end)
    else:
        log.check_is_log()
        log.begin(contents.name, contents.sequence)
    contents.log = log


def _load(path: Path, hyper: HyperNet | None, max_bytes: int | None) -> Contents:
    """What a snapshot holds."""
    snapshot = Snapshot(path)
    meta, tensors, guards = snapshot.meta, snapshot.tensors, snapshot.guards
    if meta.get("max_bytes") is None and max_bytes is not None:
        raise ValueError("max_bytes must be None for a bank that was saved without a budget")
    try:
        guards["table"](None)
        latents = tensors.pop("latents", None)
        packed = tensors.pop("keys", None)
        spec, activations, transform = _network_in(meta)
        contents = Contents(
            spec,
            activations,
            meta["dtype"],
            torch.device("cpu"),
            transform=transform,
            latent=None if latents is None else (latents.shape[1], latents.dtype),
            max_bytes=meta["max_bytes"] if max_bytes is None else max_bytes,
        )
        if type(meta["sequence"]) is not int or not 0 <= meta["sequence"] < 1 << 62:
            raise ValueError("its sequence number")
        contents.name, contents.sequence = meta["bank"], meta["sequence"]
        contents.mark = meta["hyper"]
        columns = tuple(tensors.pop(name) for name in contents.format.columns)
        keys = None if packed is None else partial(_read_keys, packed, guards["keys"], path)
        contents.table.adopt(tensors.pop("table"), keys, columns, latents, guards)
        if tensors:
            raise ValueError(f"it holds {sorted(tensors)} as well")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BankFileError(f"{path} is not a bank that can be read: {error}") from error
    if hyper is not None:
        _attach(contents, hyper, path)
    elif contents.max_bytes is not None:
        raise ValueError(f"hyper must be given: {path} holds latents, not weights")
    return contents


def _attach(contents: Contents, hyper: HyperNet, path: Path) -> None:
    """Takes ``hyper`` as the hypernetwork of an opened bank."""
    if not isinstance(hyper, HyperNet):
        raise TypeError(f"hyper must be a HyperNet, got {type(hyper).__name__}")
    if hyper.spec != contents.spec or hyper.device != contents.device:
        raise ValueError(f"hyper must generate {contents.spec} on {contents.device}, got {hyper!r}")
    latent, stored = (hyper.z_dim, hyper.dtype), contents.table.latents
    fits = stored is None or stored.columns[0] == latent
    if not fits or contents.mark not in (None, mark_of(hyper)):
        raise BankFileError(f"{path} was made with another hypernetwork than hyper")
    contents.attach(hyper)


def _describe(contents: Contents) -> dict[str, Any]:
    network = contents.text
    if network is None:
        unknown = [a for a in contents.activations if named(a) is None]
        raise ValueError(
            f"a file can hold the activations {sorted(KNOWN)}, without tensors of their own or "
            f"hooks, and not {unknown[0]}"
        )
    return {
        "bank": contents.name,
        "sequence": contents.sequence,
        "network": network,
        "dtype": name_of(contents.format),
        "hyper": contents.mark,
        "max_bytes": contents.max_bytes,
    }


def _network_in(meta: dict[str, Any]) -> tuple[MLPSpec, list[nn.Module | None], str]:
    """The networks that a file describes; an older one spelt out sizes, bias and activations."""
    if "network" in meta:
        network = Network.for_kernels(meta["network"])
        return network.spec, network.modules(), network.transform
    spec, names = MLPSpec(meta["sizes"], meta["bias"]), meta["activations"]
    target = TargetNet(names if names[-1] is not None else names[:-1])
    return spec, target.layer_activations(len(spec.layers)), ""


def _read_keys(packed: Tensor, guard: Guard, path: Path, ids: set[int]) -> Named:
    guard(None)
    try:
        return unpack_keys(packed, ids)
    except (ValueError, TypeError, RecursionError) as error:
        raise BankFileError(f"the keys of {path} cannot be read: {error}") from error


def _pieces(
    store: Store, names: Iterable[str], slots: Tensor
) -> Iterator[tuple[str, tuple[Array, Iterable[Tensor]]]]:
    """What ``slots`` of a store hold, for a file, 4 MB at a time."""
    for n, (name, (width, dtype)) in enumerate(zip(names, store.columns, strict=True)):
        array = Array(dtype, (len(slots), width))
        yield name, (array, map(partial(store.column, n), slots.split(64 * array.step)))
