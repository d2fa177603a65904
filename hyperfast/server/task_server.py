"""TaskServer: requests of many threads, answered together by one call of a bank."""

from __future__ import annotations

import atexit
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, NoReturn, SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from hyperfast import checks
from hyperfast.bank import TaskBank, fork
from hyperfast.bank.table import Key, integer
from hyperfast.layout import positive
from hyperfast.server.stats import Meter, ServerStats

LOG = logging.getLogger(__name__)


class Request(NamedTuple):
    future: Future[Tensor]
    task: int
    rows: Tensor
    size: int  # its rows
    arrived: float


class TaskServer:
    """Answers requests for single tasks, from any number of threads, in calls of many rows.

    ``server.submit(task, rows)`` returns a future at once; one thread of the server takes what
    waits, up to ``max_rows``, and answers it by one call ``bank(x, task_ids)``. A result equals
    that of a call of its own up to the rounding of a product in a batch of another size.

    When it calls: requests that arrive during a call make up the next one, so that batches grow
    with the load. After a call those that it answered often come back, and so the server waits for
    as many requests as it has just answered; yet no request waits for company longer than
    ``max_delay`` since it arrived, nor since the last call. Hence one that finds the server idle is
    answered at once: to wait could only help if more were on their way than come with the next call
    anyway.

    An exception of a call is not that of all its requests: those whose tasks are not in the bank,
    perhaps no longer, get its IndexError, and the others are called again; a call that fails for
    another reason is repeated with either half, until the request at fault is alone. On a GPU the
    exception may be of a call beside the server; a request whose task is there is called again.

    A server is closed by :meth:`close`, at the end of a ``with`` block, or when the interpreter
    exits; in each case every future is answered or cancelled before. In a forked process it is
    closed from the start: futures are the parent's, and nobody will answer them there.

    Args:
        bank: a TaskBank, which may change meanwhile, or a callable ``(x, task_ids) -> y`` that
            takes ``(R, in)`` and int64 ``(R,)`` and returns R rows. It is called by one thread.
        max_rows: rows of a call; a request with more has a call of its own.
        max_delay: seconds.
        max_waiting: requests that may wait at a time.

    Raises:
        TypeError, ValueError: an argument that is not of this kind.

    Example:
        >>> hyper = hyperfast.HyperNet(16, 64, 64, 10)
        >>> bank = hyperfast.TaskBank.from_latents(hyper, torch.randn(9, 16))
        >>> with hyperfast.TaskServer(bank) as server:  # submit from any thread
        ...     server.submit(7, torch.randn(64)).result().shape
        torch.Size([10])
    """

    def __init__(
        self,
        bank: TaskBank | Callable[[Tensor, Tensor], Tensor],
        *,
        max_rows: int = 4096,
        max_delay: float = 2e-3,
        max_waiting: int = 4096,
    ):
        if not callable(bank):
            raise TypeError(f"bank must be a TaskBank or callable, got {type(bank).__name__}")
        if not isinstance(max_delay, SupportsFloat) or isinstance(max_delay, bool):
            raise TypeError(f"max_delay must be a number of seconds, got {max_delay!r}")
        if not 0 <= max_delay <= threading.TIMEOUT_MAX:
            raise ValueError(f"max_delay must be finite and not negative, got {max_delay}")
        self.bank = bank
        self.max_rows = positive("max_rows", max_rows)
        self.max_delay = float(max_delay)
        self.max_waiting = positive("max_waiting", max_waiting)
        self._width = bank.spec.sizes[0] if isinstance(bank, TaskBank) else None
        self._device = bank.device if isinstance(bank, TaskBank) else None
        # One lock, for microseconds at a time, around all that follows. Futures are answered
        # outside: their callbacks may call the server.
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)  # the worker waits for it
        self._room = threading.Condition(self._lock)  # who submits to a full server
        self._waiting: deque[Request] = deque()
        self._rows = 0  # that wait
        self._meter = Meter()
        self._asleep = False  # the worker, and nobody has woken it
        self._company = 1  # requests to wait for
        self._closed = False
        # A daemon, for the interpreter joins other threads before it runs what atexit holds.
        self._worker = threading.Thread(target=self._work, name="hyperfast.TaskServer", daemon=True)
        fork.register(self, self._lock)
        self._worker.start()
        atexit.register(self.close)

    def after_fork(self) -> None:
        """The worker is not here: whoever asks learns that the server is closed."""
        self._closed = True

    def submit(self, task: Key, rows: Tensor, *, timeout: float | None = None) -> Future[Tensor]:
        """Asks for ``rows`` through the network of ``task``.

        Args:
            task: an int is the id of a task, a str the key of one; for keys that are ints give
                ``bank.keys[key]``. A key is looked up now, an id when the call begins.
            rows: ``(n, in)`` or ``(in,)``, floating-point. They must not change until there is a
                result.
            timeout: seconds to wait for room where ``max_waiting`` requests wait; ``None``: any
                time, 0: none.

        Returns:
            a future of ``(n, out)`` or ``(out,)`` in the dtype of ``rows``, without gradient. It
            can be cancelled until its call begins. Its callbacks run in the server's thread, and
            hold up all others; there, ``submit`` never waits for room. IndexError is the future's
            exception for an id that is not, or no longer, in the bank.

        Raises:
            queue.Full: no room in that time.
            RuntimeError: the server is closed.
            KeyError: no task has the key.
            TypeError: ``task`` is no int or str, ``rows`` are not floating-point.
            ValueError: shapes or devices that disagree.
            IndexError: ``task`` is negative, or has more than 63 bits.
        """
        rows = checks.check_tensor("rows", rows)
        checks.check_dense(rows=rows)
        shape, width = rows.shape, self._width
        # Attributes, not methods: those let go of the interpreter's lock, and with many threads it
        # takes as long to come back to it as all else here.
        if not rows.dtype.is_floating_point:
            raise TypeError(f"rows must be a floating-point tensor, got {rows.dtype}")
        if len(shape) not in (1, 2) or (width is not None and shape[-1] != width):
            wanted = "in" if width is None else width
            raise ValueError(
                f"rows must have shape (n, {wanted}) or ({wanted},), got {checks.shape(rows)}"
            )
        if self._device is not None and rows.device != self._device:
            raise ValueError(
                f"rows must be on the device of the bank, {self._device}, got {rows.device}"
            )
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout must not be negative, got {timeout}")
        size = shape[0] if len(shape) == 2 else 1
        future: Future[Tensor] = Future()
        request = Request(future, self._id(task), rows, size, time.perf_counter())
        if not self._worker.is_alive():  # in a forked process too, where the lock may be held
            raise RuntimeError("the server is closed")
        with self._lock:
            if len(self._waiting) >= self.max_waiting:
                self._wait_for_room(timeout)
            if self._closed:
                raise RuntimeError("the server is closed")
            self._waiting.append(request)
            self._rows += size
            self._meter.submitted += 1
            if self._asleep and self._ready():
                self._asleep = False
                self._wake.notify()
        return future

    def stats(self) -> ServerStats:
        """Counts, and percentiles of the latency, as they are now."""
        with self._lock:
            return self._meter.read(len(self._waiting))

    def close(self, *, cancel: bool = False) -> None:
        """Takes no more requests, and returns when those that wait are answered.

        Args:
            cancel: cancel those that wait instead, and answer only those that are running.
        """
        if not self._worker.is_alive():
            atexit.unregister(self.close)
            return
        with self._lock:
            self._closed = True
            dropped = self._take(math.inf) if cancel else []
            self._meter.cancelled += len(dropped)
            self._wake.notify()
            self._room.notify_all()
        for request in dropped:
            _contain(request.future.cancel)
            _contain(request.future.set_running_or_notify_cancel)
        if threading.current_thread() is not self._worker:
            self._worker.join()
            atexit.unregister(self.close)

    def __enter__(self) -> TaskServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes; where the block raised, what waits is cancelled."""
        self.close(cancel=kind is not None)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a TaskServer cannot be copied or pickled; make one of a copy of its bank")

    def __repr__(self) -> str:
        return f"TaskServer({self.bank!r}, max_rows={self.max_rows}, max_delay={self.max_delay})"

    def _id(self, task: Key) -> int:
        if isinstance(task, str):
            if not isinstance(self.bank, TaskBank):
                raise TypeError(f"task must be an int where bank is no TaskBank, got {task!r}")
            return self.bank.keys[task]
        number = integer("task must be an int or a str", task)
        if not 0 <= number < 1 << 63:
            raise IndexError(f"task must be in [0, 2**63), got {number}")
        return number

    # What follows up to the worker's part is called with the lock held.

    def _ready(self) -> bool:
        """Whether to call now, without waiting for more requests."""
        full = len(self._waiting) >= self._company or self._rows >= self.max_rows
        return bool(self._waiting) and (full or self._closed)

    def _take(self, most: float) -> list[Request]:
        """Takes out requests of ``most`` rows in all, or a single one of more."""
        taken: list[Request] = []
        rows = 0
        while self._waiting and (not taken or rows + self._waiting[0].size <= most):
            taken.append(self._waiting.popleft())
            rows += taken[-1].size
        self._rows -= rows
        self._room.notify(len(taken))
        return taken

    def _wait_for_room(self, timeout: float | None) -> None:
        """Every request taken out wakes one who waits here. Who is woken and finds no room was
        overtaken by a request that is yet to be taken out, and so will be woken again."""
        if threading.current_thread() is self._worker:
            timeout = 0  # nobody else could make room
        end = None if timeout is None else time.perf_counter() + timeout
        while not self._closed and len(self._waiting) >= self.max_waiting:
            left = None if end is None else end - time.perf_counter()
            if left is not None and left <= 0:
                self._meter.refused += 1
                raise queue.Full(f"{len(self._waiting)} requests wait, and no more may")
            self._room.wait(left)

    # The worker's part

    def _work(self) -> None:
        batch: deque[Request] = deque()
        running: list[Request] = []
        try:
            with torch.no_grad():
                while self._next(batch):
                    self._begin(batch, running)
                    self._answer_all(running)
                    running.clear()
        except BaseException as cause:
            # Memory that ran out, or a mistake in this class: nobody may be left waiting for it.
            with self._lock:
                self._closed = True
                batch.extend(self._take(math.inf))
                self._room.notify_all()
            self._begin(batch, running)
            left = [request.future for request in running if not request.future.done()]
            with self._lock:
                self._meter.failed += len(left)
            for future in left:
                error = RuntimeError("the server's thread ended before it answered")
                error.__cause__ = cause
                _contain(future.set_exception, error)
            raise

    def _next(self, batch: deque[Request]) -> bool:
        """Waits until there is a call to make, and puts its requests into ``batch``; False when
        the server is closed and nothing waits."""
        ended = time.perf_counter()
        with self._lock:
            while not self._ready():
                if self._closed:
                    return False
                left = None
                if self._company > 1:
                    since = min(ended, self._waiting[0].arrived) if self._waiting else ended
                    left = since + self.max_delay - time.perf_counter()
                    if left <= 0:
                        self._company = 1
                        continue
                self._asleep = True
                self._wake.wait(left)
                self._asleep = False
            batch.extend(self._take(self.max_rows))
            self._company = len(batch)
        return True

    def _begin(self, batch: deque[Request], running: list[Request]) -> None:
        """Moves requests from ``batch`` to ``running``, where they cannot be cancelled any more."""
        while batch:
            request = batch.popleft()
            if _contain(request.future.set_running_or_notify_cancel):
                running.append(request)
            else:
                with self._lock:
                    self._meter.cancelled += 1

    def _answer_all(self, requests: list[Request]) -> None:
        """In a call for each dtype, and each width where the bank is a callable."""
        alike: dict[object, list[Request]] = {}
        for request in requests:
            rows = request.rows
            alike.setdefault((rows.dtype, rows.shape[-1], rows.device), []).append(request)
        for group in alike.values():
            self._answer(group)

    def _answer(self, group: list[Request], again: bool = False) -> None:
        with self._lock:
            self._meter.calls += 1
        try:
            results = self._call(group)
        except BaseException as error:
            alone = len(group) == 1
            if alone and (again or not self._of_another(error, group)):
                with self._lock:
                    self._meter.failed += 1
                _contain(group[0].future.set_exception, error)
                return
        else:
            with self._lock:
                self._meter.done += len(group)
                self._meter.rows += sum(request.size for request in group)
            for request, result in zip(group, results, strict=True):
                _contain(request.future.set_result, result)
            now = time.perf_counter()
            with self._lock:
                self._meter.latencies.extend([now - request.arrived for request in group])
            return
        # Not within the handler, lest an exception hold, as its context, requests of others.
        for part in [group] if alone else self._apart(group):
            self._answer(part, again=alone)

    def _apart(self, group: list[Request]) -> list[list[Request]]:
        """Requests that could not be answered together: those whose tasks are gone each for itself,
        or two halves."""
        if isinstance(self.bank, TaskBank):
            known = self._known(self.bank, group)
            if not all(known):
                there = [
                    request for request, is_there in zip(group, known, strict=True) if is_there
                ]
                gone = [[r] for r, is_there in zip(group, known, strict=True) if not is_there]
                return [there, *gone] if there else gone
        half = len(group) // 2
        return [group[:half], group[half:]]

    def _of_another(self, error: BaseException, group: list[Request]) -> bool:
        """Whether an exception says that tasks are gone which are there: on a GPU it may be what a
        call of someone beside the server has missed."""
        return (
            isinstance(error, IndexError)
            and isinstance(self.bank, TaskBank)
            and all(self._known(self.bank, group))
        )

    def _known(self, bank: TaskBank, group: list[Request]) -> list[bool]:
        """Which tasks are in the bank now."""
        tasks = [request.task for request in group]
        ids = torch.tensor(tasks, dtype=torch.int64, device=bank.device)
        table = bank.contents.table
        with table.lock:
            known: list[bool] = table.look_up(ids)[1].tolist()
        return known

    def _call(self, group: list[Request]) -> list[Tensor]:
        sizes = [request.size for request in group]
        tables = [r.rows if r.rows.ndim == 2 else r.rows.unsqueeze(0) for r in group]
        x = torch.cat(tables)
        tasks = [request.task for request in group]
        ids = torch.tensor(tasks, dtype=torch.int64, device=x.device)
        if sizes.count(1) < len(sizes):
            repeats = torch.tensor(sizes, dtype=torch.int64, device=x.device)
            ids = ids.repeat_interleave(repeats, output_size=len(x))
        y = self.bank(x, ids)
        if isinstance(self.bank, TaskBank):
            self.bank.check()  # these requests are to hear of it, not the next
        if not isinstance(y, Tensor) or y.shape[:1] != x.shape[:1]:
            got = checks.shape(y) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"bank must return a Tensor of {len(x)} rows, got {got}")
        # Copies: a view would keep, and pickle, the results of all others.
        parts: tuple[Tensor, ...] = torch.ops.aten.split_with_sizes_copy(y, sizes)
        return [p if r.rows.ndim == 2 else p.squeeze(0) for p, r in zip(parts, group, strict=True)]


def _contain(call: Callable[..., Any], *args: object) -> Any:
    """Calls a method of a future. The future's callbacks are not ours and must not end the caller;
    it contains what they raise, but for SystemExit."""
    try:
        return call(*args)
    except (Exception, SystemExit):
        LOG.exception("a future of a TaskServer could not be answered, or one of its callbacks")
        return None
