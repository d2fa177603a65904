"""The look-up of ids that are on a GPU. To see them the host would wait for all that runs there;
so a kernel looks them up, and the host hears later of one that no task has."""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor

from hyperfast.bank.rows import Columns, Segment
from hyperfast.plans.gpu import HAS_TRITON


def answers_later(device: torch.device) -> bool:
    """Whether ids on ``device`` are looked up there."""
    return device.type == "cuda" and HAS_TRITON


class Words:
    """Words of the host's memory that kernels can write.

    A kernel that is on its way may write the word of a bank that is gone. So none is given twice,
    and their memory stays as long as the process: 8 bytes a bank.
    """

    def __init__(self, pinned: bool):
        self._pinned = pinned
        self._lock = threading.Lock()
        self._pages: list[Tensor] = []
        self._left = 0

    def new(self) -> Tensor:
        """``(1,)`` int64."""
        with self._lock:
            if not self._left:
                page = torch.empty(512, dtype=torch.int64, device="cpu", pin_memory=self._pinned)
                self._pages.append(page)
                self._left = len(page)
            self._left -= 1
            return self._pages[-1][self._left :][:1]


PINNED, PLAIN = Words(pinned=True), Words(pinned=False)


class Deferred:
    """Look-ups in the codes of a table, whose lock the caller holds.

    A missing id goes to a word of the host's memory that kernels can write: to see whether there is
    one waits for nothing. A row that asks for it is marked, and reads some other task's weights.

    A graph keeps the addresses with which it was captured. They stay valid as long as the bank,
    which sees to it that a graph sees every change: in place; or, when the bank moves to larger
    memory, by finding nobody from then on in what is left behind.
    """

    def __init__(self, device: torch.device):
        from hyperfast.kernels.triton import launch, look_up

        self._launch, self._look_up, self._nobody = launch, look_up.look_up, look_up.NOBODY
        self._device = device
        self._tell(PINNED if device.type == "cuda" else PLAIN)
        self._captured: list[tuple[Tensor, Columns]] = []
        self._left: list[tuple[Tensor, Columns]] = []  # kept for the graphs that were captured

    def _tell(self, words: Words) -> None:
        self._fault = words.new().fill_(self._nobody)
        self._word = ctypes.c_int64.from_address(self._fault.data_ptr())

    def after_fork(self) -> None:
        """CUDA's memory is not the child's: to read it would end the process."""
        self._tell(PLAIN)

    def find(self, ids: Tensor, codes: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
        """The slots ``(R,)`` of tasks, and which of ``ids (R,)`` are missing ``(R,)``."""
        known = any(held is codes and of is columns for held, of in self._captured)
        if not known and self._launch.capturing(self._device):
            self._captured.append((codes, columns))
        return self._look_up(ids, codes, len(columns[0]), self._fault)

    def renewed(self, codes: Tensor, segments: tuple[Segment, ...]) -> Tensor:
        """The codes to go on with, once the bank has moved, before anything can be captured there:
        graphs that were captured with what it has left find nobody in theirs."""
        columns = segments[-1].columns if segments else ()
        if all(held is codes and of is columns for held, of in self._captured):
            return codes
        if any(held is codes for held, _ in self._captured):
            codes = codes.clone()
        for held, _ in self._captured:
            held.fill_(-1)
        self._left += self._captured
        self._captured = []
        return codes

    def wait(self) -> None:
        """For the look-ups so far, on the current stream; not with the lock held."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def check(self) -> None:
        """Raises IndexError if a look-up, of those that have run, missed an id."""
        missing = self._word.value
        if missing == self._nobody:
            return
        self._word.value = self._nobody
        hint = ", or the bank grew after a graph was captured" if self._left else ""
        raise IndexError(f"no task of the bank has the id {missing}, of an earlier call{hint}")
