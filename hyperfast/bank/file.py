"""A bank on disk: a memory-mapped safetensors file.

A **block** is a safetensors image: ``u64 length | JSON header | tensors back to back``, all little
endian. Its header is exactly what :func:`header` makes of its metadata and shapes, so that a reader
who makes it again and finds the same bytes knows that every tensor lies within the block.

A **snapshot** is a block whose first tensor, ``checksums (I64)``, holds CRC-32s: of the header, of
every part of every other tensor (whole rows, about 64 KB), and last of the checksums before it.
Header, checksums and small tensors are verified when a file is opened; a part of a mapped tensor
before its first use.

What is written is an :class:`OwnFile`: of one bank and one process at a time, never more open to
others than the file whose place it takes.
"""

from __future__ import annotations

import ctypes
import io
import json
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from hyperfast.bank import fork

try:
    import fcntl
except ImportError:  # not on Windows, where nothing guards against two writers
    fcntl = None  # type: ignore[assignment]

FORMAT = "hyperfast.TaskBank/1"
DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 1 << 16
PART = 1 << 16


class BankFileError(ValueError):
    """A file that is damaged, is not a bank, or does not fit what it is opened with."""


class Array(NamedTuple):
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        size = self.dtype.itemsize
        for n in self.shape[1:]:
            size *= n
        return size

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_bytes

    @property
    def step(self) -> int:
        """Rows of one part."""
        return max(1, PART // max(1, self.row_bytes))

    @property
    def parts(self) -> int:
        return -(-self.shape[0] // self.step)


def header(meta: Mapping[str, Any], arrays: Mapping[str, Array]) -> tuple[bytes, dict[str, int]]:
    """The head of a block, length included, and where in the block each tensor begins.

    Wide dtypes come first, so that every tensor is aligned.
    """
    entries: dict[str, Any] = {
        "__metadata__": {"format": FORMAT, "bank": json.dumps(meta, sort_keys=True)}
    }
    at, starts = 0, {}
    for name, array in sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize):
        starts[name] = at
        at += array.nbytes
        entries[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [starts[name], at],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + start for name, start in starts.items()}


def parse(block: memoryview, source: str) -> tuple[dict[str, Any], dict[str, Array], int]:
    """Metadata and arrays of a block, and the length of its head. Every tensor lies within it.

    Raises:
        BankFileError: the block is none that :func:`header` made.
    """
    length = int.from_bytes(block[:8], "little")
    if len(block) < 8 or length > min(len(block) - 8, HEADER_LIMIT):
        raise BankFileError(f"{source} is not a bank: its header does not fit")
    head = bytes(block[: 8 + length])
    try:
        entries = json.loads(head[8:].decode())
        meta = json.loads(entries.pop("__metadata__")["bank"])
        arrays = {
            name: Array(DTYPES[entry["dtype"]], tuple(entry["shape"]))
            for name, entry in entries.items()
        }
        sizes = [n for array in arrays.values() for n in array.shape]
        if any(type(n) is not int or not 0 <= n < 1 << 48 for n in sizes):
            raise ValueError("a size")
        if any(len(array.shape) not in (1, 2) for array in arrays.values()):
            raise ValueError("a shape")
        again, _ = header(meta, arrays)
        if again != head or not isinstance(meta, dict):
            raise ValueError("not canonical")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BankFileError(f"{source} is not a bank, or its header is damaged") from error
    size = len(head) + sum(array.nbytes for array in arrays.values())
    if size != len(block):
        raise BankFileError(f"{source} must have {size} bytes by its header, got {len(block)}")
    return meta, arrays, len(head)


def raw(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, kept alive by it.

    Raises:
        ValueError: a tensor that is not, whose address is no memory that can be read here.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"tensor must be contiguous and on the CPU, got one on {tensor.device}")
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(b"")
    memory = (ctypes.c_char * size).from_address(tensor.data_ptr())
    memory.owner = tensor  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")


def view(buffer: Any, array: Array, start: int) -> Tensor:
    """The tensor at ``start`` of a writable buffer, which it keeps alive."""
    if array.nbytes == 0:
        return torch.empty(array.shape, dtype=array.dtype, device="cpu")
    flat = torch.frombuffer(
        buffer, dtype=array.dtype, count=array.nbytes // array.dtype.itemsize, offset=start
    )
    return flat.view(array.shape)


def write_snapshot(
    path: Path,
    meta: Mapping[str, Any],
    content: Mapping[str, tuple[Array, Iterable[Tensor]]],
    like: Path,
) -> None:
    """Writes a file that is either there in whole or not at all, also after a crash.

    Args:
        content: of every tensor its shape, and its rows in consecutive pieces; all but the last
            piece of a tensor hold a multiple of ``step`` rows.
        like: as of :func:`replacing`.
    """
    count = 2 + sum(array.parts for array, _ in content.values())
    arrays = {"checksums": Array(torch.int64, (count,))}
    arrays |= {name: array for name, (array, _) in content.items()}
    head, starts = header(meta, arrays)
    if len(head) > HEADER_LIMIT:
        raise ValueError(f"the description of the bank must fit into {HEADER_LIMIT} bytes")
    with replacing(path, like) as file:
        file.write(head)
        sums = [zlib.crc32(head)]
        for name in [name for name in starts if name in content]:
            array, pieces = content[name]
            file.seek(starts[name])
            step = array.step * array.row_bytes
            for piece in pieces:
                data = raw(piece.contiguous().cpu())
                sums += [zlib.crc32(data[n : n + step]) for n in range(0, len(data), step)]
                file.write(data)
        sums.append(zlib.crc32(raw(torch.tensor(sums, dtype=torch.int64, device="cpu"))))
        file.seek(starts["checksums"])
        file.write(raw(torch.tensor(sums, dtype=torch.int64, device="cpu")))


class Snapshot:
    """A mapped file.

    Attributes:
        meta: what :func:`write_snapshot` was given.
        tensors: by name. They are private copies on write of what all processes share, and their
            content is verified only by their guard.
        guards: of every tensor its :class:`Checks`.

    Raises:
        BankFileError: not a snapshot, or its header or its checksums are damaged.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path):
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size < 8:
                raise BankFileError(f"{path} is too short to be a bank")
            # ACCESS_COPY: torch takes no read-only memory. Nothing is ever written to it.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        block = memoryview(mapped)
        self.meta, arrays, length = parse(block, str(path))
        _, starts = header(self.meta, arrays)
        count = 2 + sum(a.parts for name, a in arrays.items() if name != "checksums")
        if arrays.get("checksums") != Array(torch.int64, (count,)):
            raise BankFileError(f"{path} does not have the {count} checksums of a bank")
        # A copy of its own: 8 bytes for every 64 KB.
        sums = view(mapped, arrays["checksums"], starts["checksums"]).clone()
        own, of_header = int(sums[-1]), int(sums[0])
        if zlib.crc32(raw(sums[:-1])) != own or zlib.crc32(block[:length]) != of_header:
            raise BankFileError(f"{path} is damaged: its header or its checksums have changed")
        self.tensors: dict[str, Tensor] = {}
        self.guards: dict[str, Checks] = {}
        at = 1
        for name, array in arrays.items():
            if name == "checksums":
                continue
            data = block[starts[name] : starts[name] + array.nbytes]
            self.tensors[name] = view(mapped, array, starts[name])
            self.guards[name] = Checks(
                f"{name} of {path}", data, array, sums[at : at + array.parts]
            )
            at += array.parts


class Checks:
    """The guard of one mapped tensor: verifies a part when one of its rows is first asked for."""

    def __init__(self, name: str, data: memoryview, array: Array, sums: Tensor):
        self._name, self._data, self._array, self._sums = name, data, array, sums
        self._verified = 0  # at least so many parts, for threads may verify one twice
        self._pending: Tensor | None = torch.ones(len(sums), dtype=torch.bool, device="cpu")

    def __call__(self, slots: Tensor | None) -> None:
        """Raises BankFileError if one of ``slots``, or any for ``None``, lies in a damaged part.

        Threads may verify the same part twice. None goes on before its parts are verified, for a
        part leaves ``pending`` only afterwards.
        """
        pending = self._pending
        if pending is None:
            return
        if slots is not None:
            touched = slots.div(self._array.step, rounding_mode="floor")
            wanted = touched[pending[touched]].unique()
        else:
            wanted = pending.nonzero().squeeze(1)
        if not len(wanted):
            return
        size = self._array.step * self._array.row_bytes
        for part in wanted.tolist():
            if zlib.crc32(self._data[part * size : (part + 1) * size]) != int(self._sums[part]):
                first = part * self._array.step
                last = min(first + self._array.step, self._array.shape[0]) - 1
                raise BankFileError(f"{self._name} is damaged in its rows {first} to {last}")
        pending[wanted] = False
        self._verified += len(wanted)
        # Looked for only when it may be so: a batch of few rows must not read a flag of every part.
        if self._verified >= len(pending) and not bool(pending.any()):
            self._pending = None


def open_regular(path: Path) -> BinaryIO:
    """Opens a file to read it, but no pipe: that would wait for a writer.

    Raises:
        BankFileError: it is not a regular file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise BankFileError(f"{path} is not a regular file")
    return open(path, "rb")


class OwnFile:
    """A file that no other bank has open in this way, and no other process: a fork lets go of it.

    Nothing is buffered, for a child would write its copy of the buffer when it ends. Made by
    :func:`own`.

    Attributes:
        pid: the process that opened it, the only one that may write.
    """

    def __init__(self, path: Path, file: io.FileIO):
        self.path, self.pid = path, os.getpid()
        self._file = file
        fork.register(self)

    @property
    def closed(self) -> bool:
        return self._file.closed

    @property
    def inherited(self) -> bool:
        """Whether this process is a fork of the one that opened it."""
        return os.getpid() != self.pid

    @property
    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def is_at(self, path: Path) -> bool:
        """Whether this is the file of that name."""
        return os.path.samestat(os.fstat(self._file.fileno()), os.stat(path))

    def seek(self, at: int) -> None:
        self._file.seek(at)

    def write(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]

    def truncate(self, size: int) -> None:
        self._file.truncate(size)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def take_place_of(self, path: Path) -> None:
        """Becomes ``path``, at once; when this returns, it is so on disk."""
        self.sync()
        os.replace(self.path, path)
        self.path = path
        sync_folder(path)

    def close(self) -> None:
        """Lets go of the file, and of its lock in the process that took it: a child must not give
        it away, and one that still has the file open, though told, must not keep it."""
        if self.closed:
            return
        if fcntl is not None and not self.inherited:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()

    after_fork = close


def own(path: Path, like: Path, *, new: bool = False) -> OwnFile:
    """Opens or makes a file that no other process has open in this way.

    A file that is made has the mode of ``like`` (and, as far as this user may, its owner) before
    there is anything in it; without such a file, what the umask says. One that is not ``new``, a
    log, can be written by its owner, though the bank be read-only.

    Args:
        new: make it; what has that name was left by a crash, and is removed.

    Raises:
        BankFileError: another process has it open.
    """
    try:
        model = os.stat(like)
    except FileNotFoundError:
        model = None
    while True:
        with fork.held_off():
            file, made = _open(path, 0o666 if model is None else 0o600, stale=new)
            try:
                if fcntl is not None:
                    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Who held it may have renamed or removed it before we got the lock.
                held = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
                if held and (made or not new):
                    if made and model is not None:
                        _take_over(file.fileno(), model, 0 if new else stat.S_IRUSR | stat.S_IWUSR)
                    return OwnFile(path, file)
                if held:
                    os.unlink(path)
            except FileNotFoundError:
                pass
            except BlockingIOError:
                file.close()
                raise BankFileError(f"{path} is being written by another bank") from None
            except BaseException:
                file.close()
                raise
            file.close()


def _open(path: Path, mode: int, stale: bool) -> tuple[io.FileIO, bool]:
    """Opens a file, made with ``mode`` if there is none, and whether it was made; one that is
    ``stale`` only to lock it, for its mode may forbid to write, and it may be anything."""
    binary = getattr(os, "O_BINARY", 0)
    while True:
        try:
            new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | binary, mode)
            return io.FileIO(new, "r+b"), True
        except FileExistsError:
            pass
        try:
            if stale:
                access = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
                return io.FileIO(os.open(path, access | binary), "rb"), False
            return io.FileIO(os.open(path, os.O_RDWR | binary), "r+b"), False
        except FileNotFoundError:  # removed meanwhile
            if path.is_symlink():
                raise


def _take_over(file: int, model: os.stat_result, least: int) -> None:
    """Gives an open file the mode of ``model``, and its owner and group where this user may."""
    if not hasattr(os, "fchown"):  # on Windows
        return
    mode, made = stat.S_IMODE(model.st_mode) | least, os.fstat(file)
    if made.st_uid != model.st_uid:
        with suppress(PermissionError):
            os.fchown(file, model.st_uid, -1)
    if made.st_gid != model.st_gid:
        try:
            os.fchown(file, -1, model.st_gid)
        except PermissionError:  # what one group may do, another must not
            mode &= ~stat.S_IRWXG | (mode & stat.S_IRWXO) << 3
    os.fchmod(file, mode)


@contextmanager
def replacing(path: Path, like: Path | None = None) -> Iterator[OwnFile]:
    """A new file, which takes the place of ``path`` when the block ends: at once, and durably. If
    the block raises, ``path`` is as it was.

    Args:
        like: whose mode it has; by default that of ``path``.
    """
    file = own(path.with_name(path.name + ".tmp"), like or path, new=True)
    temporary = file.path
    try:
        yield file
        file.take_place_of(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        file.close()


def sync_folder(path: Path) -> None:
    """Makes the name of ``path`` in its folder durable."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
