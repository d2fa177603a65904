"""A TaskServer under many threads, beside its bank without it.

Every client asks for one row of a random task, waits for the answer, and asks again. The ways to
answer take turns, so that a machine that slows down slows all; every answer of a turn is checked
after it.
"""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

import hyperfast
from bench.measure.load import ForeignLoad
from bench.measure.race import quartiles, rounded
from hyperfast.server.stats import percentile

TASKS, SIZES = 20_000, (64, 64, 10)
POOL = 256  # different requests of a client

# task, row (in,) -> (out,)
Ask = Callable[[int, Tensor], Tensor]


def make_bank(tasks: int) -> hyperfast.TaskBank:
    spec = hyperfast.MLPSpec(SIZES)
    rng = torch.Generator().manual_seed(0)
    return hyperfast.TaskBank.from_weights(
        spec, torch.randn(tasks, spec.numel, generator=rng) * SIZES[0] ** -0.5
    )


def ways(bank: hyperfast.TaskBank, server: hyperfast.TaskServer) -> dict[str, Ask]:
    """The server, and what a client does without one."""
    lock = threading.Lock()

    def direct(task: int, row: Tensor) -> Tensor:
        return bank(row.unsqueeze(0), torch.tensor([task]))[0]

    def in_turn(task: int, row: Tensor) -> Tensor:
        # Threads that all run small ops hand the interpreter's lock over at every op.
        with lock:
            return direct(task, row)

    return {
        "TaskServer": lambda task, row: server.submit(task, row).result(),
        "bank": direct,
        "bank, one thread at a time": in_turn,
    }


def turn(bank: hyperfast.TaskBank, ask: Ask, clients: int, seconds: float) -> list[float]:
    """The seconds that each request took which so many clients made in this time.

    Raises:
        AssertionError: an answer was wrong.
    """
    rng = torch.Generator().manual_seed(0)
    tasks = torch.randint(len(bank), (clients, POOL), generator=rng)
    rows = torch.randn(clients, POOL, SIZES[0], generator=rng)
    expected = bank(rows.flatten(0, 1), tasks.flatten()).unflatten(0, (clients, POOL))
    answers: list[dict[int, Tensor]] = [{} for _ in range(clients)]
    times: list[list[float]] = [[] for _ in range(clients)]
    start = threading.Barrier(clients)

    def client(n: int) -> None:
        requests = list(zip(tasks[n].tolist(), rows[n].unbind(), strict=True))
        start.wait()
        end = time.perf_counter() + seconds
        for k in itertools.cycle(range(POOL)):
            begin = time.perf_counter()
            answers[n][k] = ask(*requests[k])
            times[n].append(time.perf_counter() - begin)
            if begin + times[n][-1] >= end:
                return

    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    gc.collect()
    gc.disable()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.enable()
    for right, got in zip(expected, answers, strict=True):
        want = right[list(got)]
        torch.testing.assert_close(torch.stack(list(got.values())), want, rtol=1e-4, atol=1e-4)
    return [t for of_client in times for t in of_client]


def race(tasks: int, clients: Sequence[int], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each number of clients and way: requests a second, and how many times as many the
    server answers; latencies; with the quartiles of that ratio over the rounds."""
    bank = make_bank(tasks)
    table = []
    for number in clients:
        with hyperfast.TaskServer(bank) as server, ForeignLoad() as load:
            asks = ways(bank, server)
            times: dict[str, list[list[float]]] = {name: [] for name in asks}
            for n in range(rounds + 1):  # the first is not counted
                for name in list(asks)[:: 1 if n % 2 else -1]:
                    took = turn(bank, asks[name], number, seconds if n else seconds / 5)
                    if n:
                        times[name].append(took)
            stats = server.stats()
        for name, turns in times.items():
            ordered = sorted(t for took in turns for t in took)
            ratios = [len(a) / len(b) for a, b in zip(times["TaskServer"], turns, strict=True)]
            low, _, high = quartiles(ratios)
            table.append(
                {
                    "clients": number,
                    "way": name,
                    "requests_per_second": rounded(len(ordered) / rounds / seconds),
                    "p50_ms": rounded(percentile(ordered, 0.5) * 1e3),
                    "p99_ms": rounded(percentile(ordered, 0.99) * 1e3),
                    "ratio": rounded(median(ratios)),
                    "ratio_q1": rounded(low),
                    "ratio_q3": rounded(high),
                    "rows_per_call": rounded(stats.rows / stats.calls)
                    if name == "TaskServer"
                    else 1,
                    "foreign_load": rounded(load.share, 2),
                }
            )
            print(show(table[-1]), flush=True)
    return table


def show(row: dict[str, Any]) -> str:
    return (
        f"{row['clients']:>3} clients  {row['way']:<28}{row['requests_per_second']:>8,.0f}/s  "
        f"p50 {row['p50_ms']:>7.3f} ms  p99 {row['p99_ms']:>7.3f} ms  "
        f"TaskServer {row['ratio']:.2f}x ({row['ratio_q1']:.2f} to {row['ratio_q3']:.2f})"
    )
