"""Which task is where: ids, keys, rows of weights and latents, shared by readers and writers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from hyperfast.bank.rows import Columns, Format, Guard, Store
from hyperfast.kernels.rows import blocks
from hyperfast.plans.sizes import BLOCK

Key: TypeAlias = str | int
Named: TypeAlias = list[tuple[int, Key]]

# A task id is a slot, and above it how many tasks had that slot before: an id is never issued
# twice, and the table does not grow with the ids ever issued.
SLOT = (1 << 32) - 1
LAST = ((1 << 31) - 1) << 32
# What the table holds of a slot: its task's id (of a free slot: the next to be issued), the rows of
# its weights and of its latent (-1: none), and when the weights were last used.
ID, ROW, LATENT, USED = range(4)


class Change(NamedTuple):
    """New content of tasks, ready to be published."""

    ids: Tensor
    rows: Tensor
    latents: Tensor
    names: Named


class Table:
    """The content of a bank.

    Two locks. ``lock`` is held for microseconds around every change of the table and of the stores'
    books, and where a reader looks up a batch; see :class:`Store` for why this suffices. ``write``
    is held by one writer for a whole change, which may take long, while readers go on: content is
    prepared, then logged, then published at once.

    Args:
        latent: size and dtype of a latent; ``None`` where tasks have none.
        limit: how many tasks may have weights at a time; the others need latents.
    """

    def __init__(
        self,
        format: Format,
        device: torch.device,
        latent: tuple[int, torch.dtype] | None,
        limit: int | None,
    ):
        self.format = format
        self.device = device
        self.limit = limit
        self.weights = Store(tuple(format.columns.values()), device, limit)
        self.latents = Store([latent], device) if latent is not None else None
        self.lock = threading.Lock()
        self.write = threading.RLock()
        self.count = 0
        self._keys: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._unread: Callable[[set[int]], Named] | None = None
        self._reading = threading.Lock()
        self._entries = torch.full((64, 4), -1, dtype=torch.int64, device=device)
        self._codes = self._code(torch.arange(64, device=device))
        self._slots = 0
        # Whether the row of every task is its id, which saves the look-up. So it is until one is
        # updated or removed.
        self._in_order = limit is None
        self._free: list[int] = []  # a heap
        self._tick = 0

    # Reading

    @property
    def keys(self) -> dict[Key, int]:
        """The ids of tasks by key."""
        self.read_keys()
        return self._keys

    def read_keys(self) -> None:
        """Reads the keys of a file, once, before they are first asked for or changed: a million
        take a second.

        Raises:
            BankFileError: they are damaged.
        """
        with self._reading:
            if self._unread is not None:
                names = self._unread(set(self.ids().tolist()))
                self._keys = {key: task for task, key in names}
                self._key_of = dict(names)
                self._unread = None

    @property
    def resident(self) -> int:
        """How many tasks have weights now."""
        with self.lock:
            return int((self._entries[:, ROW] >= 0).sum())

    def ids(self, keys: Iterable[Key] | None = None) -> Tensor:
        """The ids of the tasks with these keys, or of all tasks."""
        known = self.keys if keys is not None else {}
        with self.lock:
            if keys is None:
                entries = self._entries[: self._slots]
                return entries[alive(entries), ID]
            found = [known[key] for key in keys]
        return torch.tensor(found, dtype=torch.int64, device=self.device)

    def look_up(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The entries ``(n, 4)`` of tasks, and which of them are there ``(n,)``; the caller holds
        one of the locks."""
        places = (ids & SLOT).clamp_(max=len(self._entries) - 1)
        entries = self._entries.index_select(0, places)
        return entries, (entries[:, ID] == ids) & alive(entries)

    def find(self, ids: Tensor) -> Tensor:
        """The entries ``(n, 4)`` of tasks; the caller holds one of the locks.

        Raises:
            IndexError: there is no such task.
        """
        entries, known = self.look_up(ids)
        if not bool(known.all()):
            raise IndexError(f"no task of the bank has the id {int(ids[~known][0])}")
        return entries

    def visit(
        self, ids: Tensor, generate: Callable[[Tensor], Columns]
    ) -> Iterator[tuple[Columns, Tensor | None, Tensor]]:
        """Where the weights of tasks are: ``(columns, where, local)`` says that those of
        ``ids[where]`` (``None``: of all) are the rows ``local`` of ``columns``.

        Args:
            ids: ``(R,)``, at least one.
            generate: makes columns of latents, for tasks that have no weights now.
        """
        ids = ids.clone()  # what is checked is what is used, whatever the caller does meanwhile
        with self.lock:
            rows, end = (ids, self._slots) if self._in_order else (self._rows(ids), SLOT)
            low, high = torch.aminmax(rows)
            complete = int(low) >= 0 and int(high) < end
            if not complete:
                entries = self.find(ids)
            if self.limit is not None:
                self._tick += 1
                self._entries[ids & SLOT, USED] = self._tick
            reader = self.weights.enter()
            latents = None if complete else self.latents
            regenerator = latents.enter() if latents is not None else None
        try:
            # Left before new weights are kept: they may take the rows that this batch has used.
            try:
                if latents is None:
                    yield from self.weights.parts(rows)
                    return
                here = (rows != SLOT).nonzero().squeeze(1)
                for columns, where, local in self.weights.parts(rows[here]):
                    yield columns, here if where is None else here[where], local
            finally:
                with self.lock:
                    self.weights.leave(reader)
            gone = (rows == SLOT).nonzero().squeeze(1)
            size = max(1, BLOCK // self.format.spec.numel)
            for seeds, where, local in blocks(entries[gone, LATENT], size):
                columns = generate(latents.column(0, seeds))
                yield columns, gone[where], local
                owners = torch.empty_like(seeds).index_copy_(0, local, ids[gone[where]])
                self._keep(owners, seeds, columns)
        finally:
            if latents is not None:
                with self.lock:
                    latents.leave(regenerator)

    def _code(self, slots: Tensor) -> Tensor:
        """What makes a row of an id: ``code ^ id`` is the row of the slot's task, or SLOT where it
        has none, if the id is the entry's, and negative or above SLOT if it is not.

        A look-up reads 8 bytes a row: while weights stream through the caches it is bound by how
        many lines of the table it misses.
        """
        ids, rows = self._entries[slots, ID], self._entries[slots, ROW]
        return (ids & ~SLOT) | ((rows & SLOT) ^ slots)

    def _rows(self, ids: Tensor) -> Tensor:
        slots = ids & SLOT
        if self.device.type != "cpu" and int(slots.max()) >= len(self._codes):
            self.find(ids)  # raises; on the CPU index_select checks by itself
        try:
            return self._codes.index_select(0, slots).bitwise_xor_(ids)
        except IndexError:
            self.find(ids)
            raise

    def _keep(self, ids: Tensor, seeds: Tensor, columns: Columns) -> None:
        """Keeps generated weights, of tasks still without, in place of those not used longest."""
        assert self.limit is not None
        slots = ids & SLOT
        with self.lock:
            entries = self._entries[slots]
            # While the caller reads the latents, no row of them can stand for another latent.
            same = (entries[:, ID] == ids) & (entries[:, LATENT] == seeds)
            new = (same & (entries[:, ROW] < 0)).nonzero().squeeze(1)[: self.limit]
            rows = self.weights.reserve(len(new))
            if len(rows) < len(new):
                resident = (self._entries[:, ROW] >= 0).nonzero().squeeze(1)
                # A few more than needed, for the search reads the whole table.
                count = max(len(new) - len(rows), self.limit // 16)
                used = self._entries[resident, USED]
                oldest = resident[used.topk(min(count, len(used)), largest=False).indices]
                self.weights.release(self._entries[oldest, ROW])
                self._entries[oldest, ROW] = -1
                self._codes[oldest] = self._code(oldest)
                rows = torch.cat([rows, self.weights.reserve(len(new) - len(rows))])
            new = new[: len(rows)]  # fewer, while other readers hold what was released
            self.weights.write(rows, tuple(column[new] for column in columns))
            self._entries[slots[new], ROW] = rows
            self._codes[slots[new]] = self._code(slots[new])

    # Changing. The caller holds ``write``.

    def fresh_ids(self, count: int) -> Tensor:
        """The ids of the next ``count`` tasks, of the lowest free slots: they depend on nothing but
        the entries, so that a log is repeated with the same ids."""
        reused = [heappop(self._free) for _ in range(min(count, len(self._free)))]
        for slot in reused:
            heappush(self._free, slot)
        new = torch.arange(self._slots, self._slots + count - len(reused), device=self.device)
        return torch.cat([self._entries[reused, ID], new])

    @contextmanager
    def prepare(
        self, ids: Tensor, columns: Iterable[Columns] | None, z: Tensor | None, names: Named
    ) -> Iterator[Change]:
        """Stores content for tasks, and gives it back if the block within raises."""
        rows = latents = torch.full_like(ids, -1)
        try:
            if columns is not None:
                with self.lock:
                    rows = self.weights.reserve(len(ids))
                first = 0
                for part in columns:
                    last = first + len(part[0])
                    self.weights.write(rows[first:last], part)
                    first = last
            if z is not None:
                assert self.latents is not None
                with self.lock:
                    latents = self.latents.reserve(len(ids))
                self.latents.write(latents, (z,))
            yield Change(ids, rows, latents, names)
        except BaseException:
            with self.lock:
                self._release(rows, latents)
            raise

    def add(self, change: Change) -> None:
        """Publishes tasks of new ids."""
        slots = change.ids & SLOT
        end = max(self._slots, int(slots.max()) + 1) if len(slots) else self._slots
        more = max(end - len(self._entries), len(self._entries))
        with self.lock:
            if end > len(self._entries):
                self._entries = torch.cat([self._entries, self._entries.new_full((more, 4), -1)])
                self._codes = torch.cat([self._codes, self._codes.new_empty(more)])
                unused = torch.arange(self._slots, len(self._entries), device=self.device)
                self._codes[unused] = self._code(unused)
            for _ in range(len(slots) - (end - self._slots)):
                heappop(self._free)
            self._slots = end
            self.count += len(slots)
            self._keys.update((key, task) for task, key in change.names)
            self._key_of.update(change.names)
            self._in_order &= torch.equal(change.ids, change.rows)
            self._publish(change)

    def update(self, change: Change) -> None:
        """Publishes new content of tasks."""
        slots = change.ids & SLOT
        with self.lock:
            self._release(self._entries[slots, ROW], self._entries[slots, LATENT])
            self._in_order = False
            self._publish(change)

    def remove(self, ids: Tensor) -> None:
        """Frees the slots of tasks; a slot that has no id left stays empty."""
        slots = ids & SLOT
        keys = self.keys
        with self.lock:
            self._release(self._entries[slots, ROW], self._entries[slots, LATENT])
            self._in_order = False
            spent = ids >= LAST
            self._entries[slots, ID] = torch.where(spent, ids, ids + SLOT + 1)
            self._entries[slots, ROW : LATENT + 1] = -1
            self._codes[slots] = self._code(slots)
            for slot in slots[~spent].tolist():
                heappush(self._free, slot)
            self.count -= len(ids)
            for task in ids.tolist():
                if (key := self._key_of.pop(task, None)) is not None:
                    del keys[key]

    def _publish(self, change: Change) -> None:
        self._tick += 1
        used = torch.full_like(change.ids, self._tick)
        slots = change.ids & SLOT
        self._entries[slots] = torch.stack([*change[:3], used], 1)
        self._codes[slots] = self._code(slots)

    def _release(self, rows: Tensor, latents: Tensor) -> None:
        self.weights.release(rows)
        if self.latents is not None:
            self.latents.release(latents)

    # Files

    @contextmanager
    def frozen(self) -> Iterator[tuple[Tensor, Named]]:
        """Entries ``(slots, 3)`` and keys as they are now, and their rows until the block ends. The
        caller holds ``write`` when it begins."""
        stores = [store for store in (self.weights, self.latents) if store is not None]
        names = [(task, key) for key, task in self.keys.items()]
        with self.lock:
            entries = self._entries[: self._slots, : LATENT + 1].clone()
            readers = [store.enter() for store in stores]
        try:
            yield entries, names
        finally:
            with self.lock:
                for store, reader in zip(stores, readers, strict=True):
                    store.leave(reader)

    def check(self) -> None:
        """Reads all that was mapped from a file; raises BankFileError if some of it is damaged."""
        for store in (self.weights, self.latents):
            if store is not None:
                store.check()

    def adopt(
        self,
        entries: Tensor,
        keys: Callable[[set[int]], Named] | None,
        weights: Columns,
        latents: Tensor | None,
        guards: Mapping[str, Guard],
    ) -> None:
        """Takes over the content of a file; the table must be empty.

        Raises:
            ValueError: it does not fit together.
        """
        fits(self.weights.columns, weights, len(weights[0]))
        self.weights.adopt(weights, tuple(guards[name] for name in self.format.columns))
        rows = self.weights.rows, 0
        if self.latents is not None and latents is not None:
            fits(self.latents.columns, (latents,), len(latents))
            self.latents.adopt((latents,), (guards["latents"],))
            rows = self.weights.rows, self.latents.rows
        fits([(3, torch.int64)], (entries,), len(entries))
        good = (entries[:, ID] >= 0) & (entries[:, ID] & SLOT == torch.arange(len(entries)))
        for column, end in zip((ROW, LATENT), rows, strict=True):
            good &= (entries[:, column] >= -1) & (entries[:, column] < end)
        if self.limit is None:
            good &= (entries[:, ROW] >= 0) | (entries[:, LATENT] < 0)
        if not bool(good.all()) or (self.limit is not None and rows[0]):
            raise ValueError("its table is wrong")
        self._slots = len(entries)
        self._entries = torch.full((max(64, self._slots), 4), -1, dtype=torch.int64)
        self._entries[: self._slots, :USED] = entries
        self._codes = self._code(torch.arange(len(self._entries)))
        held = alive(entries)
        self.count = int(held.sum())
        self._in_order = self.limit is None and torch.equal(entries[:, ID], entries[:, ROW])
        self._unread = keys
        free = ~held & (entries[:, ID] < LAST)
        self._free = free.nonzero().squeeze(1).tolist()


def alive(entries: Tensor) -> Tensor:
    """Which entries hold a task."""
    return (entries[:, ROW] >= 0) | (entries[:, LATENT] >= 0)


def fits(columns: Iterable[tuple[int, torch.dtype]], values: Columns, count: int) -> None:
    """Raises ValueError unless ``values`` are ``count`` rows of ``columns``."""
    for (width, dtype), value in zip(columns, values, strict=True):
        if value.shape != (count, width) or value.dtype != dtype:
            raise ValueError(f"{count} rows of {width} {dtype} do not have shape {value.shape}")
