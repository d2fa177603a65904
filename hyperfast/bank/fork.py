"""What a forked process inherits: locks that nobody there will release, and files that are its
parent's.

A fork copies a lock as it is, held or not, but only the thread that forks: what another thread held
stays held. A file's lock (``flock``) is shared, so that a child could give it away, and keeps it
while it lives. So a fork waits until nobody is within one of the short critical sections, whose
data are then whole on both sides, and what lives on in the child is told.
"""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager
from typing import Protocol
from weakref import WeakKeyDictionary


class Inherited(Protocol):
    def after_fork(self) -> None:
        """Called in the child, by its only thread."""


_known: WeakKeyDictionary[Inherited, threading.Lock | None] = WeakKeyDictionary()
_guard = threading.RLock()
_held: list[threading.Lock] = []


def register(inherited: Inherited, lock: threading.Lock | None = None) -> None:
    """From now on nobody forks while a thread holds ``lock``, which is only ever held briefly, and
    a child calls ``inherited.after_fork()``."""
    with _guard:
        _known[inherited] = lock


def held_off() -> AbstractContextManager[object]:
    """Within the context nobody forks; it must be brief."""
    return _guard


def _before() -> None:
    _guard.acquire()
    for lock in [lock for lock in list(_known.values()) if lock is not None]:
        lock.acquire()
        _held.append(lock)


def _after() -> None:
    while _held:
        _held.pop().release()
    _guard.release()


def _in_child() -> None:
    _after()
    for inherited in list(_known):
        inherited.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)
