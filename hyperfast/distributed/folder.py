"""A sharded bank on disk: a folder with one bank file a rank, and a manifest that names them.

A save writes files of new names, then replaces the manifest at once, then removes what no manifest
names. So a crash leaves the old set or the new one; what it leaves besides, the next save removes.
``torch.distributed.checkpoint`` is not used: its metadata is a pickle, it has no checksums, and its
tensors are cut along their rows, not by the hash of a key.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hyperfast.bank import TaskBank
from hyperfast.bank.contents import STEP
from hyperfast.bank.file import BankFileError, exclusive, sync_folder
from hyperfast.bank.table import LATENT, ROW
from hyperfast.distributed.ranks import owner
from hyperfast.nn.hypernet import HyperNet
from hyperfast.nn.target import TargetNet

FORMAT = "hyperfast.ShardedTaskBank/1"
MANIFEST = "manifest.json"
SHARD = re.compile(r"[0-9a-f]{16}\.\d+-of-\d+\.safetensors(\.tmp)?")


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Attributes:
        files: the bank of every rank, by its name.
        tasks: how many there are in all.
        issued: below it, all ids are spent.
    """

    files: list[str]
    tasks: int
    issued: int

    @property
    def checksum(self) -> int:
        return zlib.crc32(json.dumps([FORMAT, asdict(self)]).encode())

    @classmethod
    def new(cls, stem: int, ranks: int, tasks: int, issued: int) -> Manifest:
        files = [f"{stem:016x}.{rank}-of-{ranks}.safetensors" for rank in range(ranks)]
        return cls(files, tasks, issued)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            BankFileError: there is none, or it is damaged.
        """
        path = folder / MANIFEST
        try:
            entries = json.loads(path.read_bytes())
            checksum, kind = entries.pop("checksum"), entries.pop("format")
            manifest = cls(**entries)
            if kind != FORMAT or checksum != manifest.checksum:
                raise ValueError("its checksum")
            if not manifest.files or not all(map(SHARD.fullmatch, manifest.files)):
                raise ValueError("its files")
        except FileNotFoundError:
            raise BankFileError(f"{folder} is not a sharded bank: it has no {MANIFEST}") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BankFileError(f"{path} is not a manifest, or is damaged: {error}") from error
        return manifest

    def write(self, folder: Path) -> None:
        """Makes this the manifest of ``folder``; when it returns, it is on disk."""
        path, temporary = folder / MANIFEST, folder / f"{MANIFEST}.tmp"
        entries = {"format": FORMAT, **asdict(self), "checksum": self.checksum}
        with open(temporary, "wb") as file:
            file.write(json.dumps(entries, indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within the context no other group saves into ``folder``; in the end, files that its manifest
    does not name are removed.

    Raises:
        BankFileError: another group does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / "lock"):
        try:
            yield
        finally:
            # What cannot be removed now is left to the next save; what was saved is safe.
            with suppress(OSError, BankFileError):
                keep = set(Manifest.read(folder).files)
                for path in folder.iterdir():
                    if SHARD.fullmatch(path.name) and path.name not in keep:
                        path.unlink()


def load(
    folder: Path,
    manifest: Manifest,
    rank: int,
    ranks: int,
    *,
    hyper: HyperNet | None,
    max_bytes: int | None,
    verify: bool,
) -> TaskBank:
    """The bank of a rank: mapped from its file or, if there were another number of ranks when it
    was saved, copied from all files.

    Raises:
        BankFileError, ValueError, OSError: as of :meth:`TaskBank.open`.
    """

    def opened(name: str) -> TaskBank:
        return TaskBank.open(folder / name, hyper=hyper, max_bytes=max_bytes, verify=verify)

    if len(manifest.files) == ranks:
        return opened(manifest.files[rank])
    bank: TaskBank | None = None
    for source in map(opened, manifest.files):
        bank = _empty_like(source) if bank is None else bank
        keys = torch.tensor([*source.keys], dtype=torch.int64)
        mine = keys[owner(keys, ranks) == rank]
        for some in mine.split(max(1, STEP // source.spec.numel)):
            _copy(source, bank, some)
    assert bank is not None
    return bank


def _empty_like(source: TaskBank) -> TaskBank:
    layers: list[Any] = list(source._activations)
    latents = source._table.latents
    bank = TaskBank(
        source.spec,
        TargetNet(layers if layers[-1] is not None else layers[:-1]),
        source.dtype,
        source.device,
        source.hyper,
        None if latents is None else latents.columns[0],
        source.max_bytes,
    )
    bank._mark = source._mark
    return bank


def _copy(source: TaskBank, bank: TaskBank, keys: torch.Tensor) -> None:
    """Adds the tasks with these keys to ``bank``, as they are stored."""
    entries = source._table.find(source.ids(keys.tolist()))
    seeded = entries[:, LATENT] >= 0
    for of_kind in (seeded, ~seeded):
        names, some = keys[of_kind].tolist(), entries[of_kind]
        columns = None if bank.max_bytes is not None else [source._table.weights.take(some[:, ROW])]
        latents = source._table.latents
        z = (
            latents.column(0, some[:, LATENT])
            if latents is not None and of_kind is seeded
            else None
        )
        with bank._table.write:
            ids = bank._table.fresh_ids(len(names))
            named = list(zip(ids.tolist(), names, strict=True))
            with bank._changing("add", ids, columns, z, named):
                pass
