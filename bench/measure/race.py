"""Interleaved timing: the rivals take turns, so that a machine that slows down slows all."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles

Call = Callable[[], object]
Rounds = list[list[float]]  # seconds: one list a round, one number a call

TURN = 0.03  # seconds of timed calls in one turn
MOST_CALLS = 15  # in one turn


def warm_up(call: Call, clock: Callable[[], float] = time.perf_counter) -> None:
    """Calls until compilation and caches are behind: at least 3 times and 0.05 s."""
    start, count = clock(), 0
    while count < 3 or clock() - start < 0.05:
        call()
        count += 1


def timed_turn(call: Call, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """A call that is not timed, to push the predecessor out of caches and thread pools, then the
    seconds of each of as many calls as take about TURN seconds."""
    begin = clock()
    call()
    repeats = min(max(int(TURN / max(clock() - begin, 1e-9)), 1), MOST_CALLS)
    times = []
    for _ in range(repeats):
        begin = clock()
        call()
        times.append(clock() - begin)
    return times


def race(
    calls: Mapping[str, Call],
    rounds: int,
    turn: Callable[[Call], list[float]] = timed_turn,
) -> dict[str, Rounds]:
    """Times warmed-up calls in rounds, in each of which each rival has one turn. The order rotates,
    and every other round is reversed, so that nobody always follows the same rival."""
    order = list(calls)
    samples: dict[str, Rounds] = {name: [] for name in order}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            first = number % len(order) if order else 0
            rotated = order[first:] + order[:first]
            for name in rotated if number % 2 == 0 else reversed(rotated):
                samples[name].append(turn(calls[name]))
    finally:
        gc.enable()
    return samples


def rounded(value: float | None, digits: int = 4) -> float | None:
    """To significant digits: what a timing is worth, and a file that stays small."""
    return None if value is None else float(f"{value:.{digits}g}")


def flat(rounds: Rounds) -> list[float]:
    return [seconds for turn in rounds for seconds in turn]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratio(rival: Rounds, ours: Rounds) -> tuple[float, float, float]:
    """How many times longer the rival takes: the ratio of medians over the whole race, then the
    quartiles of the ratios of the single rounds, which tell how steady it is."""
    by_round = [median(a) / median(b) for a, b in zip(rival, ours, strict=True)]
    low, _, high = quartiles(by_round)
    return median(flat(rival)) / median(flat(ours)), low, high
