"""How busy other processes keep the machine: a race beside them measures them too."""

from __future__ import annotations

import os
import time
from pathlib import Path


class ForeignLoad:
    """`with ForeignLoad() as load: ...`, then `load.share`: the part of all cores' time that other
    processes took, or None where /proc/stat does not tell."""

    share: float | None = None

    def __enter__(self) -> ForeignLoad:
        self._start = _busy(), _own(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        busy, own, start = self._start
        now = _busy()
        if now is not None and busy is not None:
            seconds = (time.perf_counter() - start) * (os.cpu_count() or 1)
            # The kernel counts in ticks of 10 ms, hence the clamp.
            self.share = max(((now - busy) - (_own() - own)) / seconds, 0.0)


def _own() -> float:
    """CPU seconds of this process, all threads."""
    usage = os.times()
    return usage.user + usage.system


def _busy() -> float | None:
    """CPU seconds of all processes since boot."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
