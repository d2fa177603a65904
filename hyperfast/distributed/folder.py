"""A sharded bank on disk: a folder with one bank file a rank, and a manifest that names them.

A save writes files of new names, then replaces the manifest at once, then removes what no manifest
names. So a crash leaves the old set or the new one; what it leaves besides, the next save removes.
``torch.distributed.checkpoint`` is not used: its metadata is a pickle, it has no checksums, and its
tensors are cut along their rows, not by the hash of a key.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hyperfast.bank import snapshot
from hyperfast.bank.contents import STEP, Contents, Given
from hyperfast.bank.file import BankFileError, own, replacing
from hyperfast.bank.table import LATENT, SLOT
from hyperfast.distributed.ranks import owner
from hyperfast.nn.hypernet import HyperNet

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
        entries = {"format": FORMAT, **asdict(self), "checksum": self.checksum}
        with replacing(folder / MANIFEST) as file:
            file.write(json.dumps(entries, indent=1).encode())


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within the context no other group saves into ``folder``; in the end, files that its manifest
    does not name are removed.

    Raises:
        BankFileError: another group does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = own(folder / "lock", folder / MANIFEST)
    try:
        yield
    finally:
        # What cannot be removed now is left to the next save; what was saved is safe.
        with closing(lock), suppress(OSError, BankFileError):
            keep = set(Manifest.read(folder).files)
            for path in folder.iterdir():
                if SHARD.fullmatch(path.name) and path.name not in keep:
                    path.unlink()


def model(folder: Path, rank: int) -> Path:
    """The file whose mode a new file of ``rank`` is to have: the one that it follows."""
    try:
        files = Manifest.read(folder).files
    except (BankFileError, OSError):
        return folder / MANIFEST
    return folder / files[rank % len(files)]


def load(
    folder: Path,
    manifest: Manifest,
    rank: int,
    ranks: int,
    *,
    hyper: HyperNet | None,
    max_bytes: int | None,
    verify: bool,
) -> Contents:
    """What a rank holds: mapped from its file or, if there were another number of ranks when it was
    saved, copied from all files.

    Raises:
        BankFileError, ValueError, OSError: as of :meth:`TaskBank.open`.
    """

    def opened(name: str) -> Contents:
        path = (folder / name).resolve()
        return snapshot.open_contents(path, hyper, max_bytes, log=False, verify=verify)

    if len(manifest.files) == ranks:
        return opened(manifest.files[rank])
    contents: Contents | None = None
    for source in map(opened, manifest.files):
        contents = _empty_like(source) if contents is None else contents
        keys = torch.tensor([*source.table.keys], dtype=torch.int64, device="cpu")
        mine = keys[owner(keys, ranks) == rank]
        for some in mine.split(max(1, STEP // source.spec.numel)):
            _copy(source, contents, some)
    assert contents is not None
    return contents


def _empty_like(source: Contents) -> Contents:
    latents = source.table.latents
    contents = Contents(
        source.spec,
        source.activations,
        source.format.dtype,
        source.device,
        transform=source.format.transform,
        latent=None if latents is None else latents.columns[0],
        max_bytes=source.max_bytes,
    )
    if source.hyper is not None:
        contents.attach(source.hyper)
    contents.mark = source.mark
    return contents


def _copy(source: Contents, contents: Contents, keys: Tensor) -> None:
    """Adds the tasks with these keys to ``contents``, as they are stored."""
    table = source.table
    entries = table.find(table.ids(keys.tolist()))
    from_latents = entries[:, LATENT] >= 0
    for of_kind in (from_latents, ~from_latents):
        some, z = entries[of_kind], None
        if table.latents is not None and of_kind is from_latents:
            z = table.latents.column(0, some[:, LATENT])
        blocks = None if contents.max_bytes is not None else [table.weights.take(some[:, SLOT])]
        with contents.adding(Given(len(some), z, blocks), keys[of_kind].tolist()):
            pass
