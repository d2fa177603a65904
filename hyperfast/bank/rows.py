"""Rows that grow, and that readers can rely on: where a bank keeps its numbers.

The number of a row is its *slot*; rows without more are those of ``x``, everywhere in the library.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from hyperfast.plans import cpu

Columns: TypeAlias = tuple[Tensor, ...]

# Below so many bytes in memory, growth copies all rows into one segment: a copy of 32 MB takes
# about 10 ms, and every further segment costs each later batch about 0.1 ms.
MERGE = 32 << 20


class Guard(Protocol):
    """Checks slots of a column before their first use."""

    def __call__(self, slots: Tensor | None) -> None:
        """Raises if one of ``slots`` (``None``: any) is damaged."""


class Segment(NamedTuple):
    """Slots ``start, start + 1, ...`` of every column."""

    start: int
    columns: Columns
    guards: tuple[Guard, ...] = ()


class Store:
    """Slots of columns that grow, and whose content never changes under a reader.

    Slots are found through the bank's table, and the bank's lock is held around every change of the
    table and around :meth:`enter`, :meth:`leave`, :meth:`reserve`, :meth:`release` and
    :meth:`adopt`. Then no slot is written while a reader may use it:

    - A reader enters, and copies its slots from the table, in one critical section. Entering
      notes the store's epoch.
    - A slot is released in the critical section that takes it out of the table; this ends an epoch.
      Who enters later cannot have found it. So it may be reused as soon as every reader present
      entered after the epoch in which it was released; ``reserve`` waits for just that.
    - A reserved slot is in no table until its content is complete; :meth:`write` needs no lock.

    ``segments`` is a tuple that is replaced, never changed: readers keep the one they saw.
    Slots of a segment that is mapped from a file are never reused.

    Args:
        columns: width and dtype of every column.
        limit: the largest number of slots; ``reserve`` returns fewer where there are no more.
        whole: growth copies all rows into one segment, however many, as long as there is memory for
            both: on a GPU a copy takes less than a millisecond a gigabyte. Slots are left to spare,
            so that an update of few tasks finds some, and moves nothing.
    """

    def __init__(
        self,
        columns: Sequence[tuple[int, torch.dtype]],
        device: torch.device,
        limit: int | None = None,
        whole: bool = False,
    ):
        self.columns = tuple(columns)
        self.device = device
        self.limit = limit
        self.whole = whole
        self.segments: tuple[Segment, ...] = ()
        self.slots = 0
        self._adopted = 0
        self._free: list[Tensor] = []
        self._released: deque[tuple[int, Tensor]] = deque()
        self._epoch = 0
        self._readers: dict[object, int] = {}

    def enter(self) -> object:
        """Begins to read; give what it returns to :meth:`leave`."""
        reader = object()
        self._readers[reader] = self._epoch
        return reader

    def leave(self, reader: object) -> None:
        self._readers.pop(reader, None)  # a fork may have dismissed it

    def dismiss(self) -> None:
        """Forgets all readers: they are threads of another process."""
        self._readers.clear()

    def release(self, slots: Tensor) -> None:
        """Gives back slots that are in the table no more. Negative numbers stand for none."""
        slots = slots[slots >= self._adopted]
        if len(slots):
            self._released.append((self._epoch, slots))
            self._epoch += 1

    def reserve(self, count: int) -> Tensor:
        """``count`` slots to write, fewer if the limit is reached."""
        oldest = min(self._readers.values(), default=self._epoch)
        while self._released and self._released[0][0] < oldest:
            self._free.append(self._released.popleft()[1])
        taken = [torch.empty(0, dtype=torch.int64, device=self.device)]
        while count:
            if not self._free and not self._grow(count):
                break
            slots = self._free.pop()
            if len(slots) > count:
                self._free.append(slots[count:])
            taken.append(slots[:count])
            count -= len(taken[-1])
        return torch.cat(taken)

    def adopt(self, columns: Columns, guards: tuple[Guard, ...]) -> None:
        """Takes tensors as the first slots, those of a file with its guards; only an empty store
        can. Where slots are to be spare it copies them."""
        if self.whole and not guards:
            self.write(self.reserve(len(columns[0])), columns)
            return
        self.slots = len(columns[0])
        self._adopted = self.slots if guards else 0
        if self.slots:
            self.segments = (Segment(0, columns, guards),)

    def _grow(self, count: int) -> bool:
        """More free slots: twice as many, at least ``count``, at most what the limit leaves."""
        own = self.slots - self._adopted
        spare = max(64, count // 16) if self.whole else 0
        more = max(count + spare, own, 64)
        if self.limit is not None:
            more = min(more, self.limit - own)
        if more == 0:
            return False
        slot_bytes = sum(width * dtype.itemsize for width, dtype in self.columns)
        # Merging would lose what another thread writes meanwhile to a segment that it copies. There
        # is none: who makes a store grow is its only writer, by the table's write lock or, where
        # there is a limit, by writing before it lets go of the lock that is held here.
        merge = own if self.whole or own * slot_bytes <= MERGE else 0
        try:
            columns = self._empty(merge + more)
        except torch.OutOfMemoryError:
            if not merge:
                raise
            merge, columns = 0, self._empty(more)
        kept = list(self.segments)
        if merge:
            for old in [s for s in kept if s.start >= self._adopted]:
                for column, values in zip(columns, old.columns, strict=True):
                    column[old.start - self._adopted :][: len(values)] = values
            kept = [s for s in kept if s.start < self._adopted]
        self.segments = (*kept, Segment(self.slots - merge, columns))
        self._free.append(torch.arange(self.slots, self.slots + more, device=self.device))
        self.slots += more
        return True

    def _empty(self, slots: int) -> Columns:
        return tuple(
            cpu.in_huge_pages(torch.empty(slots, width, dtype=dtype, device=self.device))
            for width, dtype in self.columns
        )

    def segments_of(self, slots: Tensor) -> Iterator[tuple[Columns, Tensor | None, Tensor]]:
        """``(columns, where, index)``: ``slots[where]`` (``None``: all) are the rows ``index`` of
        ``columns``.

        Raises:
            BankFileError: a slot that was mapped from a file is damaged.
        """
        segments = self.segments
        for n, segment in enumerate(segments):
            where, index = None, slots
            if len(segments) > 1:
                inside = slots >= segment.start
                if n + 1 < len(segments):
                    inside &= slots < segments[n + 1].start
                where = inside.nonzero().squeeze(1)
                if not len(where):
                    continue
                if len(where) == len(slots):  # as a batch of few rows often is: nothing to gather
                    where, index = None, slots - segment.start
                else:
                    index = slots.index_select(0, where) - segment.start
            for guard in segment.guards:
                guard(index)
            yield segment.columns, where, index
            if where is None:
                return

    def column(self, n: int, slots: Tensor) -> Tensor:
        """A copy of ``slots`` of the column numbered ``n``."""
        width, dtype = self.columns[n]
        values = torch.empty(len(slots), width, dtype=dtype, device=self.device)
        for columns, where, index in self.segments_of(slots):
            if where is None:
                torch.index_select(columns[n], 0, index, out=values)
            else:
                values[where] = columns[n].index_select(0, index)
        return values

    def take(self, slots: Tensor) -> Columns:
        """A copy of ``slots`` of every column."""
        return tuple(self.column(n, slots) for n in range(len(self.columns)))

    def write(self, slots: Tensor, values: Columns) -> None:
        """Fills reserved slots."""
        for columns, where, index in self.segments_of(slots):
            for column, value in zip(columns, values, strict=True):
                column.index_copy_(0, index, value if where is None else value[where])

    def check(self) -> None:
        """Reads all that was mapped from a file.

        Raises:
            BankFileError: some of it is damaged.
        """
        for segment in self.segments:
            for guard in segment.guards:
                guard(None)
