"""What the launchers share: rows and their tasks, sizes of tiles, the choice of a configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from statistics import median
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperfast import checks
from hyperfast.kernels.triton import direct
from hyperfast.plans import gpu

INTERPRETED = direct.INTERPRETED


class Config(NamedTuple):
    """A tile of the output, the depth of one product, warps a program, stages of its pipeline; the
    width of a product that generates weights, and the most registers of a thread."""

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3
    width: int = 64
    registers: int | None = None

    def options(self, device: torch.device) -> dict[str, int]:
        """What the compiler is told. The limit is a Hopper's, whose products need few registers
        besides their sums."""
        limit = {"maxnreg": self.registers} if self.registers and hopper(device) else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


@triton.jit(debug=True)
def _keys(ids, keys, rows, tasks, BLOCK: tl.constexpr):
    """Task ids as int32 sort keys. An id out of range traps, as PyTorch's own indexing does."""
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    id = tl.load(ids + r, mask=r < rows, other=0)
    tl.device_assert((id >= 0) & (id < tasks), "task_ids out of range", mask=r < rows)
    tl.store(keys + r, tl.minimum(tl.maximum(id, 0), tasks - 1).to(tl.int32), mask=r < rows)


@triton.jit
def entry(r, keys, per_task, live, TASK: tl.constexpr, RAGGED: tl.constexpr):
    """The entry of an operand that belongs to row ``r``: the row itself, or its task."""
    if TASK and RAGGED:
        r = tl.load(keys + r, mask=live, other=0).to(tl.int64)
    elif TASK:
        r = r // per_task
    return r


class Rows:
    """Which task every row belongs to: ``keys``, or ``per_task`` rows each when there are none.

    The order of mixed rows is found once, at its first use.
    """

    def __init__(self, tasks: int, total: int, per_task: int, keys: Tensor | None = None):
        self.tasks, self.total, self.per_task, self.keys = tasks, total, per_task, keys

    @property
    def ragged(self) -> bool:
        return self.keys is not None

    @property
    def few(self) -> bool:
        """Whether mixed rows are fewer than the tasks."""
        return self.ragged and self.total < self.tasks

    def each(self, h: Tensor) -> Tensor:
        """For each row what is its task's of ``h``, an entry a task."""
        if self.keys is not None:
            return h.index_select(0, self.keys)
        return h if self.per_task == 1 else h.repeat_interleave(self.per_task, 0)

    def alone(self, h: Tensor) -> tuple[Tensor, Rows]:
        """The mixed rows as tasks of their own, and what is theirs of ``h``."""
        return self.each(h), Rows(self.total, self.total, 1)

    @cached_property
    def sorted(self) -> tuple[Tensor | None, Tensor | None]:
        """The keys in order, and the rows that they belong to."""
        if self.keys is None:
            return None, None
        keys, order = self.keys.sort(stable=True)
        return keys, order

    @cached_property
    def starts(self) -> Tensor | None:
        """``(tasks + 1,)``: where each task begins among the sorted rows."""
        keys, _ = self.sorted
        if keys is None:
            return None
        edges = torch.arange(self.tasks + 1, dtype=keys.dtype, device=keys.device)
        return torch.searchsorted(keys, edges)


def rows_of(
    rows: list[Tensor], per_task: list[Tensor], task_ids: Tensor | None, tasks: int
) -> Rows:
    """The rows, after a check that all arguments speak of the same ones.

    Raises:
        ValueError: they do not.
        IndexError: an id is out of range (on a GPU, a device-side assertion).
    """
    checks.check_rows_match(rows, per_task, tasks, task_ids)
    if task_ids is None:
        return Rows(tasks, tasks * rows[0].shape[1], rows[0].shape[1])
    if task_ids.dtype != torch.int64 or task_ids.device != rows[0].device:
        raise TypeError(
            f"task_ids must be int64 on {rows[0].device}, got {task_ids.dtype} on {task_ids.device}"
        )
    if INTERPRETED:
        checks.check_in_range(task_ids, tasks)
    keys = torch.empty(task_ids.shape, dtype=torch.int32, device=task_ids.device)
    start(_keys, up(len(keys), 1024), task_ids.contiguous(), keys, len(keys), tasks, BLOCK=1024)
    return Rows(tasks, len(keys), 1, keys)


def agree(**tensors: Tensor | None) -> None:
    """One dtype, one device: a kernel trusts both."""
    name, first = next((name, t) for name, t in tensors.items() if t is not None)
    dtype, device = first.dtype, first.device
    for other, t in tensors.items():
        if t is not None and (t.dtype != dtype or t.device != device):
            raise TypeError(
                f"{other} must be of {name}'s dtype and device, {dtype} on {device}, "
                f"got {t.dtype} on {t.device}"
            )


def expect(t: Tensor | None, name: str, shape: Sequence[int]) -> None:
    if t is not None and t.shape != torch.Size(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """16-bit products are summed in fp32; fp32 ones are rounded to TF32 where PyTorch's are."""
    return {
        "SUM": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if gpu.unit(dtype) == "tf32" else "ieee",
    }


def index(t: Tensor) -> tl.dtype:
    """What holds the offset of any element."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return tl.int32 if last < 2**31 else tl.int64


# Whether to time the configurations at the first call of a size, instead of taking the default.
AUTOTUNE = os.environ.get("HYPERFAST_AUTOTUNE") == "1"
tuned: dict[tuple, Config] = {}


def run(
    table: Sequence[Config],
    programs: Callable[[Config], int],
    launch: Callable[[Config], None],
    key: tuple,
    device: torch.device,
) -> None:
    """Launches the largest tile that gives three quarters of the multiprocessors a program, else
    the smallest tile; or, when tuning, the one that was fastest for this key."""
    enough = 3 * multiprocessors(device) // 4
    config = tuned.get(key) or next((c for c in table if programs(c) >= enough), table[-1])
    if AUTOTUNE and key not in tuned and not capturing(device):
        config = tuned[key] = min(table, key=lambda c: milliseconds(lambda: launch(c)))
    launch(config)


def capturing(device: torch.device) -> bool:
    """Whether what is launched there now does not run, but is captured in a graph."""
    if INTERPRETED:
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def milliseconds(call: Callable[[], None], repeats: int = 5) -> float:
    """The median of a few launches, after one that compiles."""
    call()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in events)


def start(kernel: Any, programs: int, first: Tensor, *args: Any, **options: Any) -> None:
    """Launches a kernel, unless it has nothing to do."""
    if programs:
        direct.launch(kernel, programs, (first, *args), options)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def hopper(device: torch.device) -> bool:
    """Whether warp groups multiply, from shared memory."""
    if INTERPRETED or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def up(n: int, size: int) -> int:
    """Blocks of ``size`` that cover ``n``."""
    return -(-n // size)


def power(n: int) -> int:
    """The power of two at or above ``n``, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def tile(n: int) -> int:
    """The same, at least the 16 of a matrix unit."""
    return max(power(n), 16)


@lru_cache(maxsize=4096)
def deep(n: int, most: int) -> int:
    """The depth of one product for a sum of ``n`` terms: the least padding, where one product
    costs its depth and 16 more."""
    depths = [d for d in (128, 64, 32, 16) if d <= most]
    return min(depths, key=lambda d: up(n, d) * (d + 16))
