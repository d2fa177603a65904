"""How parameters are cut into chunks of one kind, and joined of them again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from hyperfast.layout import ParamSpec, positive

Chunks: TypeAlias = int | tuple[int, int]


def check_chunks(chunks: Chunks) -> Chunks:
    """``chunks`` as a size, or as rows and columns; raises TypeError or ValueError."""
    given: Any = chunks
    if hasattr(given, "tolist"):  # a tensor or an array
        given = given.tolist()
    if not isinstance(given, Sequence):
        return positive("chunks", given)
    if len(given) != 2 or isinstance(given, str | bytes):
        raise ValueError(f"chunks must be a size, or a pair (rows, cols), got {chunks!r}")
    return positive("chunks[0]", given[0]), positive("chunks[1]", given[1])


def layout_of(spec: ParamSpec, chunks: Chunks) -> Pieces | Blocks:
    """How the parameters of ``spec`` are cut."""
    return Blocks(spec, *chunks) if isinstance(chunks, tuple) else Pieces(spec, chunks)


# Chunks at the ends of a part may belong to two of them and are then made twice: a part has so many
# at least.
FEWEST = 4


class Part(NamedTuple):
    """Some outputs of one parameter: the head that makes their chunks, which of its chunks these
    are, and how they are joined, ``(B, chunks, ...)`` to ``(B, outputs, ins)``."""

    head: int
    chunks: slice
    join: Callable[[Tensor], Tensor]


class Pieces:
    """The flat vector in pieces of one size (von Oswald et al. 2020); the end of the last is not
    used.

    Attributes:
        counts: the number of chunks that each head makes.
    """

    def __init__(self, spec: ParamSpec, size: int):
        self.numel, self.size = spec.numel, min(size, max(spec.numel, 1))
        self.counts = (-(-spec.numel // self.size),)
        self.starts = tuple(accumulate(spec.numels, initial=0))
        self.ins = tuple(math.prod(shape[1:]) for shape in spec.shapes)

    def heads(self, features: int, **kind: Any) -> list[nn.Sequential]:
        """Of each kind of chunk, what makes it of features."""
        return [nn.Sequential(nn.Linear(features, self.size, **kind))]

    def join(self, made: Sequence[Tensor]) -> Tensor:
        """The flat vectors ``(B, P)`` of what heads made, ``(B, count, ...)`` each."""
        return made[0].flatten(1)[:, : self.numel]

    def part(self, n: int, first: int, last: int) -> Part:
        """Outputs ``first`` to ``last`` of parameter ``n``."""
        at, stop = (self.starts[n] + o * self.ins[n] for o in (first, last))
        chunks = slice(at // self.size, -(-stop // self.size))
        at, stop = (place - chunks.start * self.size for place in (at, stop))

        def join(made: Tensor) -> Tensor:
            return made.flatten(1)[:, at:stop].unflatten(1, (last - first, -1))

        return Part(0, chunks, join)

    def outputs(self, n: int, numbers: Sequence[int], limit: int) -> int:
        """How many outputs of parameter ``n`` a part has that holds ``limit`` numbers, where a
        chunk of each head holds so many."""
        chunks = max(limit // numbers[0], FEWEST)
        return max(chunks * self.size // self.ins[n], 1)


class _Grid(NamedTuple):
    """A parameter in blocks: which head makes these, how many lie below and beside each other, and
    what of them is used."""

    head: int
    down: int
    across: int
    out_features: int
    in_features: int


class Blocks:
    """Every parameter ``(out, in, ...)`` in blocks of ``rows x cols``, cut off at its ends where
    they do not fit; a vector is taken for ``(out, 1)``, in blocks of ``rows x 1``.

    Blocks of one width and one kernel size have a head in common, with the two layers of Ha, Dai,
    Le 2016, section 3.1: features ``h`` become ``a_i = W_i h + b_i`` for each input channel, of the
    width of ``h``, and each of these ``W_out a_i + b_out``, its kernels of all outputs.

    Attributes:
        counts: the number of chunks that each head makes.
    """

    def __init__(self, spec: ParamSpec, rows: int, cols: int):
        self.rows = rows
        counts: dict[tuple[int, int], list[int]] = {}  # of a width and a kernel size
        self.grids = []
        for shape in spec.shapes:
            out, ins, *kernel = (*shape, *(1, 1)[len(shape) :])
            kind = cols if len(shape) > 1 else 1, math.prod(kernel)
            own = counts.setdefault(kind, [])
            grid = _Grid([*counts].index(kind), -(-out // rows), -(-ins // kind[0]), out, ins)
            own.append(grid.down * grid.across)
            self.grids.append(grid)
        self.kinds = tuple(counts)
        self.each = tuple(counts.values())
        self.counts = tuple(map(sum, self.each))

    def heads(self, features: int, **kind: Any) -> list[nn.Sequential]:
        """As of :class:`Pieces`."""
        return [
            nn.Sequential(
                nn.Linear(features, cols * features, **kind),
                nn.Unflatten(-1, (cols, features)),
                nn.Linear(features, self.rows * kernel, **kind),
            )
            for cols, kernel in self.kinds
        ]

    def join(self, made: Sequence[Tensor]) -> Tensor:
        """As of :class:`Pieces`."""
        pieces = [iter(t.split(each, 1)) for t, each in zip(made, self.each, strict=True)]
        flat = [self._joined(next(pieces[g.head]), g, 0, g.out_features) for g in self.grids]
        return torch.cat([whole.flatten(1) for whole in flat], 1)

    def part(self, n: int, first: int, last: int) -> Part:
        """As of :class:`Pieces`."""
        grid = self.grids[n]
        before = sum(g.down * g.across for g in self.grids[:n] if g.head == grid.head)
        at, stop = first // self.rows, -(-last // self.rows)
        chunks = slice(before + at * grid.across, before + stop * grid.across)
        skipped = at * self.rows
        join = partial(self._joined, grid=grid, first=first - skipped, last=last - skipped)
        return Part(grid.head, chunks, join)

    def outputs(self, n: int, numbers: Sequence[int], limit: int) -> int:
        """As of :class:`Pieces`."""
        grid = self.grids[n]
        return self.rows * max(limit // (numbers[grid.head] * grid.across), 1)

    def _joined(self, blocks: Tensor, grid: _Grid, first: int, last: int) -> Tensor:
        """``(B, outputs, numbers of one)``, of whole rows of blocks ``(B, count, cols, rows *
        kernel)``; outputs count from the first that these hold."""
        blocks = blocks.unflatten(1, (-1, grid.across)).unflatten(-1, (self.rows, -1))
        whole = blocks.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)
        return whole[:, first:last, : grid.in_features].flatten(2)
