"""A TaskServer at saturation, while its bank changes."""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hyperfast
from bench.measure.race import rounded

SPEC = hyperfast.MLPSpec((8, 4), bias=False)
SAMPLES = 6
PATIENCE = 300  # seconds: a future that takes longer is lost


def weights(tasks: Tensor) -> Tensor:
    """Networks of which the one of task n gives n + 1 for a row of ones, exactly."""
    return ((tasks + 1) / 8).unsqueeze(1).expand(-1, SPEC.numel)


def resident_mb() -> float | None:
    """Memory of this process now; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def stress(
    seconds: float,
    clients: int = 64,
    tasks: int = 2000,
    bank: Callable[[hyperfast.TaskBank], Any] = lambda bank: bank,
) -> dict[str, Any]:
    """Every client keeps 32 requests of 1 to 8 rows under way, twice as many in all as the server
    lets wait. Of 64, one is for a task that was removed and must get IndexError, and one is
    cancelled if it still waits. Another thread adds, updates and removes tasks. Each answer is
    checked.

    Args:
        bank: what is served, made of the bank that changes.

    Returns:
        counts of what became of the requests; ``errors``: what went otherwise; ``lost``: futures
        without an end; latencies of the last 10,000 answers; the process's memory and how many
        requests waited, at equal intervals.
    """
    stored = hyperfast.TaskBank.from_weights(SPEC, weights(torch.arange(tasks)))
    removed = stored.add(weights=weights(torch.arange(clients)))
    stored.remove(removed)
    gone = removed.tolist()
    rows = torch.ones(8, SPEC.sizes[0])
    counts = [Counter[str]() for _ in range(clients)]
    errors: list[str] = []
    stop = threading.Event()

    def judge(task: int, size: int, future: Future[Tensor]) -> str:
        try:
            y = future.result(PATIENCE)
        except CancelledError:
            return "cancelled"
        except IndexError:
            return "removed" if task in gone else "IndexError for a task that is there"
        right = torch.equal(y, torch.full((size, SPEC.sizes[-1]), task + 1.0))
        return "answered" if right and task not in gone else "wrong answer"

    def client(n: int) -> None:
        rng = torch.Generator().manual_seed(n)
        under_way: deque[tuple[int, int, Future[Tensor]]] = deque()
        while not stop.is_set():
            ids = torch.randint(tasks, (64,), generator=rng).tolist()
            sizes = torch.randint(1, 9, (64,), generator=rng).tolist()
            ids[0] = gone[n]
            for task, size in zip(ids, sizes, strict=True):
                under_way.append((task, size, server.submit(task, rows[:size])))
                if len(under_way) == 32:
                    counts[n][judge(*under_way.popleft())] += 1
            under_way[-1][2].cancel()
        while under_way:
            counts[n][judge(*under_way.popleft())] += 1

    def change() -> None:
        some = torch.arange(0, tasks, 7)
        while not stop.is_set():
            new = stored.add(weights=weights(some))
            stored.update(some, weights=weights(some))
            stored.remove(new)

    def guarded(work: Callable[..., None], *args: int) -> None:
        try:
            work(*args)
        except BaseException as error:
            errors.append(f"{type(error).__name__}: {error}")
            stop.set()

    samples: list[tuple[float | None, int]] = []
    with hyperfast.TaskServer(bank(stored), max_waiting=clients * 16) as server:
        jobs = [(change,), *((client, n) for n in range(clients))]
        threads = [threading.Thread(target=guarded, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for _ in range(SAMPLES):
            stop.wait(seconds / SAMPLES)
            samples.append((rounded(resident_mb()), server.stats().waiting))
        stop.set()
        for thread in threads:
            thread.join()
    stats, found = server.stats(), sum(counts, Counter[str]())
    ended = {key: found.pop(key, 0) for key in ("answered", "removed", "cancelled")}
    return {
        "clients": clients,
        "seconds": seconds,
        **ended,
        "errors": errors + [f"{number} times {kind}" for kind, number in found.items()],
        "lost": stats.submitted - sum(ended.values()) - found.total(),
        "requests_per_second": rounded(stats.submitted / seconds),
        "rows_per_call": rounded(stats.rows / stats.calls),
        "p50_ms": rounded(stats.p50 * 1e3),
        "p90_ms": rounded(stats.p90 * 1e3),
        "p99_ms": rounded(stats.p99 * 1e3),
        "resident_mb": [memory for memory, _ in samples],
        "waiting": [waiting for _, waiting in samples],
    }
