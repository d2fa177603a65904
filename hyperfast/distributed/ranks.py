"""Ranks of a process group: who owns what, how they exchange rows and fail together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from hyperfast.bank.file import BankFileError

ERRORS = {
    kind.__name__: kind
    for kind in (IndexError, ValueError, TypeError, OSError, MemoryError, BankFileError)
}
MESSAGE = 1000  # bytes of an error that the other ranks are told


def owner(ids: Tensor, ranks: int) -> Tensor:
    """The rank ``(n,)`` that owns each of ``ids (n,)`` int64: their SplitMix64 hash (Steele, Lea,
    Flood 2014), modulo ``ranks``. It is the same in every process, run and version."""
    h = ids
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        h = (h ^ _logical(h, shift)) * (factor - (1 << 64))  # int64 wraps as uint64 does
    return (h ^ _logical(h, 31)).bitwise_and_((1 << 63) - 1) % ranks


def _logical(h: Tensor, shift: int) -> Tensor:
    """A shift to the right that draws in zeros."""
    return (h >> shift).bitwise_and_((1 << (64 - shift)) - 1)


class Ranks:
    """This process among those of a group; ``None`` is the group of all processes."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        # What is agreed upon is kept where the backend can send it from.
        self.device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")

    @contextmanager
    def agreed(self, width: int = 0) -> Iterator[Tensor]:
        """What raises in the block on one rank raises on all.

        Yields:
            zeros ``(ranks, width)`` int64. Into its own row a rank writes what it tells the others;
            after the block it holds what all have told.
        """
        table = torch.zeros(self.size, 1 + width, dtype=torch.int64, device=self.device)
        error: Exception | None = None
        try:
            yield table[:, 1:]
        except Exception as raised:
            error = raised
        table[self.rank, 0] = error is not None
        dist.all_gather([*table], table[self.rank].clone(), self.group)
        if bool(table[:, 0].any()):
            self._raise(error)

    def _raise(self, error: Exception | None) -> None:
        texts = torch.zeros(self.size, MESSAGE, dtype=torch.uint8, device="cpu")
        if error is not None:
            text = f"{type(error).__name__} {error}".encode()[:MESSAGE]
            texts[self.rank, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        texts = texts.to(self.device)
        dist.all_gather([*texts], texts[self.rank].clone(), self.group)
        if error is not None:
            raise error
        first = int(texts[:, 0].nonzero()[0])
        text = bytes(texts[first].tolist()).rstrip(b"\0")
        kind, _, message = text.decode(errors="replace").partition(" ")
        raise ERRORS.get(kind, RuntimeError)(f"rank {first}: {message}")

    def exchange(self, counts: Tensor, columns: Sequence[Tensor]) -> list[Tensor]:
        """Sends rows of ``columns``, and returns those that were sent to this rank.

        Args:
            counts: ``(ranks, ranks)``: how many rows each rank sends to each.
            columns: ``(n,)`` or ``(n, width)``, ordered by where they go; of the same width and
                dtype on all ranks, on a device that the group's backend serves.

        Returns:
            such columns, ordered by where they come from.
        """
        rows = [c.unsqueeze(1) if c.ndim == 1 else c for c in columns]
        sent = torch.cat([r.contiguous().view(torch.uint8) for r in rows], 1)
        out, into = counts[self.rank].tolist(), counts[:, self.rank].tolist()
        received = sent.new_empty(sum(into), sent.shape[1])
        dist.all_to_all_single(received, sent, into, out, self.group)
        parts = received.split([r.shape[1] * r.element_size() for r in rows], 1)
        # A clone, because contiguous() keeps odd strides of up to one row.
        parts = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        return [
            p.view(c.dtype).view(len(p), *c.shape[1:]) for p, c in zip(parts, columns, strict=True)
        ]
