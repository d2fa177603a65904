"""The log of a bank: what changed since its snapshot was written.

It is a sequence of records, each a block of :mod:`hyperfast.bank.file` framed by ``magic | CRC-32
of the block | u64 length | u64 sequence number | CRC-32 of these``. It begins with a record that
names the bank and the snapshot's sequence number, and what follows counts on from there.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from torch import Tensor

from hyperfast.bank.file import (
    Array,
    BankFileError,
    exclusive,
    header,
    parse,
    raw,
    sync_folder,
    view,
)

MAGIC = b"HFR1"
FRAME = struct.Struct("<4sIQQI")


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

    Raises:
        BankFileError: another process holds it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file = exclusive(path)
        self.end = 0
        self.broken = False

    def own(self) -> None:
        """Raises BankFileError if what the file holds did not start as a log: it is somebody's."""
        self.file.seek(0)
        start = self.file.read(len(MAGIC))
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
            OSError: it may not be; nothing can be appended any more.
        """
        if self.broken:
            state = "is closed" if self.file.closed else "could not be written before"
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
        self.file.write(frame)
        self.file.writelines(block)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.broken = False
        self.end += len(frame) + length

    def cut(self, end: int) -> None:
        """Drops what follows ``end``."""
        self.file.truncate(end)
        os.fsync(self.file.fileno())
        self.end = end

    def trim(self, start: int, bank: str, sequence: int) -> None:
        """Drops the records before ``start``, which a snapshot now holds."""
        new = Log(self.path.with_name(self.path.name + ".tmp"))
        new.begin(bank, sequence)
        self.file.seek(start)
        while piece := self.file.read(min(1 << 20, self.end - self.file.tell())):
            new.file.write(piece)
            new.end += len(piece)
        new.file.flush()
        os.fsync(new.file.fileno())
        os.replace(new.path, self.path)
        sync_folder(self.path)
        self.file.close()
        # What could not be appended before is not in the new file.
        self.file, self.end, self.broken = new.file, new.end, False

    def close(self) -> None:
        self.file.close()
        self.broken = True
