"""Which task is where: ids, keys, slots of weights and latents, shared by readers and writers."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from hyperfast.bank import deferred, fork
from hyperfast.bank.formats import Format
from hyperfast.bank.rows import Columns, Guard, Store
from hyperfast.kernels.rows import blocks
from hyperfast.plans.sizes import BLOCK

Key: TypeAlias = str | int
Named: TypeAlias = list[tuple[int, Key]]

# A task id is a place in the table, and above it how many tasks had that place before: an id is
# never issued twice, and the table does not grow with the ids ever issued.
PLACE = (1 << 32) - 1
LAST = ((1 << 31) - 1) << 32
# What the table holds of a place: its task's id (of a free place: the next to be issued), and the
# slots of its weights and of its latent (-1: none).
ID, SLOT, LATENT = range(3)


def code_of(ids: Tensor, slots: Tensor, places: Tensor) -> Tensor:
    """What makes a slot of an id: ``code ^ id`` is the slot of the place's task, or PLACE where it
    has none, if the id is the entry's, and negative or above PLACE if it is not.

    A look-up reads 8 bytes a row: while weights stream through the caches it is bound by how many
    lines of the table it misses.
    """
    return (ids & ~PLACE) | ((slots & PLACE) ^ places)


def integer(name: str, value: object) -> int:
    """``value`` if it is an int of Python, numpy or any other kind, but no bool.

    Raises:
        TypeError: it is not.
    """
    if type(value) is int:
        return value
    # A bool of Python or torch, but not numpy's, would say that it is an index.
    if not isinstance(value, bool) and getattr(value, "dtype", None) is not torch.bool:
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(f"{name}, got {value!r}")


def to_key(key: object) -> Key:
    """A key in the form in which it is kept and looked up.

    Raises:
        TypeError: it is neither str nor int.
    """
    if isinstance(key, str):
        return key if type(key) is str else str.__str__(key)
    return integer("keys must be str or int", key)


def several(keys: Iterable[Key]) -> Iterable[Key]:
    """``keys``; raises TypeError for a single one: text is iterable, too."""
    if isinstance(keys, str | bytes) or not isinstance(keys, Iterable):
        raise TypeError(f"keys must hold keys, got the single key {keys!r}")
    return keys


class Change(NamedTuple):
    """New content of tasks, ready to be published."""

    ids: Tensor
    slots: Tensor
    latents: Tensor
    named: Named


class Table:
    """Which tasks there are, and where in two stores their weights and latents lie.

    Two locks. ``lock`` is held for microseconds around every change of the table and of the stores'
    books, and where a reader looks up a batch; see :class:`Store` for why this suffices. ``write``
    is held by one writer for a whole change, which may take long, while readers go on: content is
    prepared, then logged, then published at once.

    A forked child has the content as it was between two critical sections, and locks of its own.

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
        # Where the host need not see ids: there are no others to generate, nor any in files.
        later = limit is None and deferred.answers_later(device)
        self.deferred = deferred.Deferred(device) if later else None
        self.weights = Store(tuple(format.columns.values()), device, limit, whole=later)
        self.latents = Store([latent], device) if latent is not None else None
        self.lock = threading.Lock()
        self.write = threading.RLock()
        self.count = 0
        self._keys: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._unread: Callable[[set[int]], Named] | None = None
        self._reading = threading.Lock()
        self._entries = torch.full((64, 3), -1, dtype=torch.int64, device=device)
        self._codes = self._code(torch.arange(64, device=device))
        self._places = 0
        # Whether the slot of every task is its id, which saves the look-up. So it is until one is
        # updated or removed.
        self._in_order = limit is None
        self._free: list[int] = []  # a heap
        # Where there is a limit, of every slot of weights: whose they are (a place; -1: nobody's),
        # and when they were last used. To look for the oldest then costs what the limit is, not
        # what the table is.
        self._owners = torch.empty(0, dtype=torch.int64, device=device)
        self._used = torch.empty(0, dtype=torch.int64, device=device)
        self._tick = 0
        fork.register(self, self.lock)

    def after_fork(self) -> None:
        """Who wrote or read in another thread is not here to end it."""
        self.write, self._reading = threading.RLock(), threading.Lock()
        for store in (self.weights, self.latents):
            if store is not None:
                store.dismiss()
        if self.deferred is not None:
            self.deferred.after_fork()

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
            return int((self._entries[:, SLOT] >= 0).sum())

    def ids(self, keys: Iterable[Key] | None = None) -> Tensor:
        """The ids of the tasks with these keys, or of all tasks."""
        if keys is None:
            with self.lock:
                entries = self._entries[: self._places]
                return entries[alive(entries), ID]
        wanted, known = [to_key(key) for key in keys], self.keys
        with self.lock:
            found = [known[key] for key in wanted]
        return torch.tensor(found, dtype=torch.int64, device=self.device)

    def look_up(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The entries ``(n, 3)`` of tasks, and which of them are there ``(n,)``; the caller holds
        one of the locks."""
        places = (ids & PLACE).clamp_(max=len(self._entries) - 1)
        entries = self._entries.index_select(0, places)
        return entries, (entries[:, ID] == ids) & alive(entries)

    def find(self, ids: Tensor) -> Tensor:
        """The entries ``(n, 3)`` of tasks; the caller holds one of the locks.

        Raises:
            IndexError: there is no such task.
        """
        entries, known = self.look_up(ids)
        check_known(ids, known)
        return entries

    def visit(
        self, ids: Tensor, generate: Callable[[Tensor], Columns]
    ) -> Iterator[tuple[Columns, Tensor | None, Tensor]]:
        """Where the weights of tasks are: ``(columns, where, index)`` says that those of
        ``ids[where]`` (``None``: of all) are the rows ``index`` of ``columns``.

        Args:
            ids: ``(R,)``, at least one.
            generate: makes columns of latents, for tasks that have no weights now.
        """
        ids = ids.clone()  # what is checked is what is used, whatever the caller does meanwhile
        with self.lock:
            slots, end = (ids, self._places) if self._in_order else (self._slots(ids), PLACE)
            low, high = torch.aminmax(slots)
            complete = int(low) >= 0 and int(high) < end
            if not complete:
                entries = self.find(ids)
            if self.limit is not None:
                self._tick += 1
                self._used[slots if complete else slots[slots != PLACE]] = self._tick
            reader = self.weights.enter()
            latents = None if complete else self.latents
            regenerator = latents.enter() if latents is not None else None
        try:
            # Left before new weights are kept: they may take the slots that this batch has used.
            try:
                if latents is None:
                    yield from self.weights.segments_of(slots)
                    return
                here = (slots != PLACE).nonzero().squeeze(1)
                for columns, where, index in self.weights.segments_of(slots[here]):
                    yield columns, here if where is None else here[where], index
            finally:
                with self.lock:
                    self.weights.leave(reader)
            gone = (slots == PLACE).nonzero().squeeze(1)
            size = max(1, BLOCK // self.format.spec.numel)
            for seeds, where, index in blocks(entries[gone, LATENT], size):
                columns = generate(latents.column(0, seeds))
                yield columns, gone[where], index
                owners = torch.empty_like(seeds).index_copy_(0, index, ids[gone[where]])
                self._keep(owners, seeds, columns)
        finally:
            if latents is not None:
                with self.lock:
                    latents.leave(regenerator)

    @contextmanager
    def deferred_visit(self, ids: Tensor) -> Iterator[tuple[Columns, Tensor, Tensor] | None]:
        """The same on a GPU, for which nothing is read from it: ``(columns, index, missing)`` says
        that the weights of ``ids`` are the rows ``index`` of ``columns``, but of those that are
        ``missing``. ``None`` where a visit must be: there are no weights, or in several segments.

        Raises:
            IndexError: an earlier visit missed a task.
        """
        assert self.deferred is not None
        with self.lock:
            self.deferred.check()
            segments = self.weights.segments
            found = None
            if len(segments) == 1:
                columns = segments[0].columns
                found = (columns, *self.deferred.find(ids, self._codes, columns))
            reader = self.weights.enter()
        try:
            yield found
        finally:
            with self.lock:
                self.weights.leave(reader)

    def _code(self, places: Tensor) -> Tensor:
        return code_of(self._entries[places, ID], self._entries[places, SLOT], places)

    def _slots(self, ids: Tensor) -> Tensor:
        places = ids & PLACE
        if self.device.type != "cpu" and int(places.max()) >= len(self._codes):
            self.find(ids)  # raises; on the CPU index_select checks by itself
        try:
            return self._codes.index_select(0, places).bitwise_xor_(ids)
        except IndexError:
            self.find(ids)
            raise

    def _keep(self, ids: Tensor, seeds: Tensor, columns: Columns) -> None:
        """Keeps generated weights, of tasks still without, in place of those not used longest."""
        assert self.limit is not None
        places = ids & PLACE
        with self.lock:
            entries = self._entries[places]
            # While the caller reads the latents, no slot of them can stand for another latent.
            same = (entries[:, ID] == ids) & (entries[:, LATENT] == seeds)
            new = (same & (entries[:, SLOT] < 0)).nonzero().squeeze(1)[: self.limit]
            slots = self.weights.reserve(len(new))
            if len(slots) < len(new):
                held = (self._owners >= 0).nonzero().squeeze(1)
                # A few more than needed, for the search reads as many as the limit is.
                count = max(len(new) - len(slots), self.limit // 16)
                count = min(count, len(held))
                oldest = held[self._used[held].topk(count, largest=False).indices]
                evicted = self._owners[oldest]
                self._release(oldest)
                self._entries[evicted, SLOT] = -1
                self._codes[evicted] = self._code(evicted)
                slots = torch.cat([slots, self.weights.reserve(len(new) - len(slots))])
            new = new[: len(slots)]  # fewer, while other readers hold what was released
            self.weights.write(slots, tuple(column[new] for column in columns))
            if (more := self.weights.slots - len(self._owners)) > 0:
                self._owners = torch.cat([self._owners, self._owners.new_full((more,), -1)])
                self._used = torch.cat([self._used, self._used.new_zeros(more)])
            self._owners[slots], self._used[slots] = places[new], self._tick
            self._entries[places[new], SLOT] = slots
            self._codes[places[new]] = self._code(places[new])

    # Changing. The caller holds ``write``.

    def fresh_ids(self, count: int) -> Tensor:
        """The ids of the next ``count`` tasks, of the lowest free places: they depend on nothing
        but the entries, so that a log is repeated with the same ids."""
        reused = [heappop(self._free) for _ in range(min(count, len(self._free)))]
        for place in reused:
            heappush(self._free, place)
        end = self._places + count - len(reused)
        new = torch.arange(self._places, end, dtype=torch.int64, device=self.device)
        return torch.cat([self._entries[reused, ID], new])

    @contextmanager
    def prepare(
        self, ids: Tensor, columns: Iterable[Columns] | None, z: Tensor | None, named: Named
    ) -> Iterator[Change]:
        """Stores content for tasks, and gives it back if the block within raises."""
        slots = latents = torch.full_like(ids, -1)
        try:
            if columns is not None:
                with self.lock:
                    slots = self.weights.reserve(len(ids))
                    self._renew()
                first = 0
                for part in columns:
                    last = first + len(part[0])
                    self.weights.write(slots[first:last], part)
                    first = last
            if z is not None:
                assert self.latents is not None
                with self.lock:
                    latents = self.latents.reserve(len(ids))
                self.latents.write(latents, (z,))
            yield Change(ids, slots, latents, named)
        except BaseException:
            with self.lock:
                self._release(slots, latents)
            raise

    def add(self, change: Change) -> None:
        """Publishes tasks of new ids."""
        places = change.ids & PLACE
        end = max(self._places, int(places.max()) + 1) if len(places) else self._places
        more = max(end - len(self._entries), len(self._entries))
        with self.lock:
            if end > len(self._entries):
                self._entries = torch.cat([self._entries, self._entries.new_full((more, 3), -1)])
                self._codes = torch.cat([self._codes, self._codes.new_empty(more)])
                unused = torch.arange(
                    self._places, len(self._entries), dtype=torch.int64, device=self.device
                )
                self._codes[unused] = self._code(unused)
            for _ in range(len(places) - (end - self._places)):
                heappop(self._free)
            self._places = end
            self.count += len(places)
            self._keys.update((key, task) for task, key in change.named)
            self._key_of.update(change.named)
            self._in_order &= torch.equal(change.ids, change.slots)
            self._renew()
            self._publish(change)

    def update(self, change: Change) -> None:
        """Publishes new content of tasks."""
        places = change.ids & PLACE
        with self.lock:
            self._release(self._entries[places, SLOT], self._entries[places, LATENT])
            self._in_order = False
            self._publish(change)

    def remove(self, ids: Tensor) -> None:
        """Frees the places of tasks; a place that has no id left stays empty."""
        places = ids & PLACE
        keys = self.keys
        with self.lock:
            self._release(self._entries[places, SLOT], self._entries[places, LATENT])
            self._in_order = False
            spent = ids >= LAST
            self._entries[places, ID] = torch.where(spent, ids, ids + PLACE + 1)
            self._entries[places, SLOT:] = -1
            self._codes[places] = self._code(places)
            for place in places[~spent].tolist():
                heappush(self._free, place)
            self.count -= len(ids)
            for task in ids.tolist():
                if (key := self._key_of.pop(task, None)) is not None:
                    del keys[key]

    def _renew(self) -> None:
        """After columns or codes may have moved, in the same critical section."""
        if self.deferred is not None:
            self._codes = self.deferred.renewed(self._codes, self.weights.segments)

    def _publish(self, change: Change) -> None:
        places = change.ids & PLACE
        self._entries[places] = torch.stack(change[:3], 1)
        self._codes[places] = self._code(places)

    def _release(self, slots: Tensor, latents: Tensor | None = None) -> None:
        if self.limit is not None:
            self._owners[slots[slots >= 0]] = -1
        self.weights.release(slots)
        if latents is not None and self.latents is not None:
            self.latents.release(latents)

    # Files and copies

    @contextmanager
    def frozen(self) -> Iterator[tuple[Tensor, Named]]:
        """Entries ``(places, 3)`` and keys as they are now, and their slots until the block ends.
        The caller holds ``write`` when it begins."""
        stores = [store for store in (self.weights, self.latents) if store is not None]
        named = [(task, key) for key, task in self.keys.items()]
        with self.lock:
            entries = self._entries[: self._places].clone()
            readers = [store.enter() for store in stores]
        try:
            yield entries, named
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
        """Takes over the content of a file, or of another table; this one must be empty.

        Raises:
            ValueError: it does not fit together.
        """
        fits(self.weights.columns, weights, len(weights[0]))
        self.weights.adopt(weights, tuple(guards[name] for name in self.format.columns if guards))
        slots = len(weights[0]), 0
        if self.latents is not None and latents is not None:
            fits(self.latents.columns, (latents,), len(latents))
            self.latents.adopt((latents,), (guards["latents"],) if guards else ())
            slots = len(weights[0]), len(latents)
        fits([(3, torch.int64)], (entries,), len(entries))
        places = torch.arange(len(entries), dtype=torch.int64, device=self.device)
        good = (entries[:, ID] >= 0) & (entries[:, ID] & PLACE == places)
        for column, end in zip((SLOT, LATENT), slots, strict=True):
            good &= (entries[:, column] >= -1) & (entries[:, column] < end)
        if self.limit is None:
            good &= (entries[:, SLOT] >= 0) | (entries[:, LATENT] < 0)
        if not bool(good.all()) or (self.limit is not None and slots[0]):
            raise ValueError("its table is wrong")
        self._places = len(entries)
        size = max(64, self._places)
        self._entries = torch.full((size, 3), -1, dtype=torch.int64, device=self.device)
        self._entries[: self._places] = entries
        self._codes = self._code(torch.arange(size, dtype=torch.int64, device=self.device))
        held = alive(entries)
        self.count = int(held.sum())
        self._in_order = self.limit is None and torch.equal(entries[:, ID], entries[:, SLOT])
        self._unread = keys
        free = ~held & (entries[:, ID] < LAST)
        self._free = free.nonzero().squeeze(1).tolist()


def check_known(ids: Tensor, known: Tensor) -> None:
    """Raises IndexError naming the first id that is not known."""
    if not bool(known.all()):
        raise IndexError(f"no task of the bank has the id {int(ids[~known][0])}")


def alive(entries: Tensor) -> Tensor:
    """Which entries hold a task."""
    return (entries[:, SLOT] >= 0) | (entries[:, LATENT] >= 0)


def fits(columns: Iterable[tuple[int, torch.dtype]], values: Columns, count: int) -> None:
    """Raises ValueError unless ``values`` are ``count`` rows of ``columns``."""
    for (width, dtype), value in zip(columns, values, strict=True):
        if value.shape != (count, width) or value.dtype != dtype:
            raise ValueError(f"{count} rows of {width} {dtype} do not have shape {value.shape}")
