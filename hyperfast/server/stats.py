"""What a server counts, and how long its requests took."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 10_000  # latest latencies kept: the 99th percentile is then the 100th largest


@dataclass(frozen=True)
class ServerStats:
    """What a :class:`hyperfast.TaskServer` did so far; ``print`` shows it.

    Every request submitted is waiting, running, or was done, failed or cancelled. Latencies, from
    submission to result, are in seconds and of the last 10,000 requests that were done; NaN before
    there is one.

    Attributes:
        submitted: requests taken in; ``refused``: those that found no room in time.
        done: answered; ``failed``: by an exception; ``cancelled``: while they waited.
        waiting: not begun, among them those cancelled and not yet taken out; ``running``: begun.
        calls: of the bank, failed ones and their repetitions too; ``rows``: that were answered.
    """

    submitted: int
    refused: int
    done: int
    failed: int
    cancelled: int
    waiting: int
    calls: int
    rows: int
    p50: float
    p90: float
    p99: float

    @property
    def running(self) -> int:
        return self.submitted - self.waiting - self.done - self.failed - self.cancelled

    def __str__(self) -> str:
        return (
            f"{self.submitted:,} requests: {self.done:,} done, {self.failed:,} failed, "
            f"{self.cancelled:,} cancelled, {self.waiting:,} waiting, {self.running:,} running; "
            f"{self.refused:,} more refused\n"
            f"{self.calls:,} calls, {self.rows / max(self.calls, 1):.1f} rows each\n"
            f"latency p50 {self.p50 * 1e3:.3g} ms, p90 {self.p90 * 1e3:.3g} ms, "
            f"p99 {self.p99 * 1e3:.3g} ms"
        )


class Meter:
    """Counts of the size of a few numbers; the server's lock is held around every use."""

    def __init__(self) -> None:
        self.submitted = self.refused = self.done = self.failed = self.cancelled = 0
        self.calls = self.rows = 0
        self.latencies: deque[float] = deque(maxlen=WINDOW)

    def read(self, waiting: int) -> ServerStats:
        ordered = sorted(self.latencies)
        return ServerStats(
            self.submitted, self.refused, self.done, self.failed, self.cancelled, waiting,
            self.calls, self.rows, *(percentile(ordered, share) for share in (0.5, 0.9, 0.99)),
        )  # fmt: skip


def percentile(ordered: Sequence[float], share: float) -> float:
    """The least of ``ordered`` that at least ``share`` of them do not exceed; NaN of none."""
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else math.nan
