"""The log of a bank: what changed since its snapshot was written.

It is a sequence of records, each a block of :mod:`hyperfast.bank.file` framed by ``magic | CRC-32
of the block | u64 length | u64 sequence number | CRC-32 of these``. It begins with a record that
names the bank and the snapshot's sequence number, and what follows counts on from there.

One process writes it: a fork of that process shares the file and its lock, and must not.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from hyperfast.bank.file import (
    Array,
    BankFileError,
    header,
    open_regular,
    own,
    parse,
    raw,
    sync_folder,
    view,
)
from hyperfast.bank.table import Named

MAGIC = b"HFR1"
FRAME = struct.Struct("<4sIQQI")
SMALL = 1 << 16


def log_path(path: Path) -> Path:
    """The log of the bank in a file."""
    return path.with_name(path.name + ".log")


class Record(NamedTuple):
    """One record, and where it ends in its file."""

    sequence: int
    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    end: int


def records(file: BinaryIO, source: str) -> Iterator[Record]:
    """The records of a log. A torn tail ends them: at most one record is ever unacknowledged, so
    what is torn is not followed by a record.

    Raises:
        BankFileError: damage other than a torn tail.
    """
    size, at = os.fstat(file.fileno()).st_size, 0
    while at < size:
        file.seek(at)
        frame = _unframe(file.read(FRAME.size))
        if frame is None:
            file.seek(at)
            rest = file.read()
            found = rest.find(MAGIC, 1)
            while found >= 0:
                if _unframe(rest[found : found + FRAME.size]):
                    raise BankFileError(f"{source} is damaged at byte {at}")
                found = rest.find(MAGIC, found + 1)
            return
        checksum, length, sequence = frame
        start, end = at + FRAME.size, at + FRAME.size + length
        if end > size:
            return
        block = bytearray(file.read(length))
        if zlib.crc32(block) != checksum:
            if end == size:
                return
            raise BankFileError(f"{source} is damaged at byte {start}")
        meta, arrays, _ = parse(memoryview(block), source)
        _, starts = header(meta, arrays)
        tensors = {name: view(block, array, starts[name]) for name, array in arrays.items()}
        yield Record(sequence, meta, tensors, end)
        at = end


def _unframe(data: bytes) -> tuple[int, int, int] | None:
    """Checksum, length and sequence number, or ``None`` if this is no frame."""
    if len(data) < FRAME.size:
        return None
    magic, checksum, length, sequence, own = FRAME.unpack(data)
    if magic != MAGIC or zlib.crc32(data[:-4]) != own:
        return None
    return checksum, length, sequence


class Log:
    """The open end of a log, held by one process at a time.

    Args:
        path: made, if it is not there, as open to others as ``bank`` is.

    Raises:
        BankFileError: another process holds it.
    """

    def __init__(self, path: Path, bank: Path):
        self.path = path
        self.file = own(path, bank)
        self.end = 0
        self.broken = False

    @property
    def closed(self) -> bool:
        return self.file.closed

    def check_owner(self) -> None:
        """Raises OSError in a process that has inherited the log."""
        if self.file.inherited:
            raise OSError(
                f"{self.path} belongs to process {self.file.pid}, of which this is a fork: here "
                "the bank can be read, not changed; to change it, open it in the process that does"
            )

    def check_is_log(self) -> None:
        """Raises BankFileError if what the file holds did not start as a log: it is somebody's."""
        with open_regular(self.path) as file:
            start = file.read(len(MAGIC))
        if start != MAGIC[: len(start)]:
            raise BankFileError(f"{self.path} is not the log of a bank; it was left as it is")

    def begin(self, bank: str, sequence: int) -> None:
        """An empty log for the snapshot of that bank and sequence number."""
        self.end = 0
        self.file.truncate(0)
        self.append(sequence, {"op": "begin", "bank": bank}, {})
        sync_folder(self.path)

    def append(self, sequence: int, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Writes a record; when this returns, it is on disk.

        Raises:
            OSError: it may not be; nothing can be appended any more. Or this is a fork of the
                process that opened the log: nothing was written.
        """
        self.check_owner()
        if self.broken:
            state = "is closed" if self.closed else "could not be written before"
            raise OSError(f"{self.path} {state}: nothing more can be changed")
        kept = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        arrays = {name: Array(t.dtype, tuple(t.shape)) for name, t in kept.items()}
        head, starts = header(meta, arrays)
        block = [memoryview(head), *(raw(kept[name]) for name in starts)]
        length, checksum = sum(len(part) for part in block), 0
        for part in block:
            checksum = zlib.crc32(part, checksum)
        frame = FRAME.pack(MAGIC, checksum, length, sequence, 0)[:-4]
        frame += struct.pack("<I", zlib.crc32(frame))
        self.broken = True
        self.file.seek(self.end)
        # The frame goes with what follows it where that is small: one write is one record.
        self.file.write(b"".join([frame, *block]) if length <= SMALL else frame)
        for part in block if length > SMALL else []:
            self.file.write(part)
        self.file.sync()
        self.broken = False
        self.end += len(frame) + length

    def cut(self, end: int) -> None:
        """Drops what follows ``end``."""
        self.file.truncate(end)
        self.file.sync()
        self.end = end

    def trim(self, start: int, bank: str, sequence: int) -> None:
        """Drops the records before ``start``, which a snapshot now holds."""
        self.check_owner()
        with ExitStack() as undo:
            temporary = self.path.with_name(self.path.name + ".tmp")
            new = Log.__new__(Log)
            new.path, new.end, new.broken = temporary, 0, False
            new.file = own(temporary, self.path, new=True)
            undo.callback(new.file.close)
            undo.callback(temporary.unlink, missing_ok=True)
            new.begin(bank, sequence)
            with open_regular(self.path) as old:
                old.seek(start)
                while piece := old.read(min(1 << 20, self.end - old.tell())):
                    new.file.write(piece)
                    new.end += len(piece)
            try:
                new.file.take_place_of(self.path)
            except BaseException:
                # What is appended to a file that has no name any more would be lost.
                self.broken |= not self.file.is_at(self.path)
                raise
            undo.pop_all()
        self.file.close()
        # What could not be appended before is not in the new file.
        self.file, self.end, self.broken = new.file, new.end, False

    def close(self) -> None:
        self.file.close()
        self.broken = True


# Keys, in snapshots and logs


def pack_keys(named: Named) -> Tensor:
    """Ids and keys as JSON, in a tensor."""
    return torch.frombuffer(bytearray(json.dumps(named).encode()), dtype=torch.uint8)


def unpack_keys(packed: Tensor, ids: set[int]) -> Named:
    """What :func:`pack_keys` packed; raises ValueError or TypeError for anything else, or for a key
    of a task that is not in ``ids``."""
    named = [(task, key) for task, key in json.loads(bytes(raw(packed)))]
    if not all(task in ids and type(key) in (str, int) for task, key in named):
        raise ValueError("its keys are not str or int, or not of its tasks")
    if not len(named) == len({task for task, _ in named}) == len({key for _, key in named}):
        raise ValueError("its keys are not different")
    return named
