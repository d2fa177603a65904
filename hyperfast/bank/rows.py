"""How a bank keeps its numbers: formats of a task's weights, and rows that readers can rely on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hyperfast.activations import run_layers
from hyperfast.functional import task_linear, task_mlp
from hyperfast.kernels.rows import blocks
from hyperfast.layout import MLPSpec, ParamSpec
from hyperfast.plans.sizes import BLOCK

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Columns = tuple[Tensor, ...]

# Below so many bytes in memory, growth copies all rows into one segment: a copy of 32 MB takes
# about 10 ms, and every further segment costs each later batch about 0.1 ms.
MERGE = 32 << 20


class Format:
    """How the flat weight vector of a task is stored: one row in each of some columns.

    A floating-point dtype has the one column ``weights (P,)``. int8 has ``weights``, the matrices
    of all layers back to back, and ``affine``, of every layer the scales ``(out,)``, then the
    biases ``(out,)`` if it has any: ``W[o, i] = scale[o] * weights[o, i]``.

    Raises:
        TypeError: a dtype that is none of these.
    """

    def __init__(self, spec: MLPSpec, dtype: torch.dtype):
        if dtype not in (*FLOATS, torch.int8):
            names = [str(d).removeprefix("torch.") for d in (*FLOATS, torch.int8)]
            raise TypeError(f"dtype must be one of {names}, got {dtype}")
        self.spec = spec
        self.dtype = dtype
        self.compute = torch.float32 if dtype == torch.int8 else dtype
        self.columns: dict[str, tuple[int, torch.dtype]] = {"weights": (spec.numel, dtype)}
        if dtype == torch.int8:
            sizes = [(layer.out_features, layer.in_features) for layer in spec.layers]
            self._matrices = ParamSpec(tuple(sizes))
            self._affine = ParamSpec(tuple((1 + spec.bias, out) for out, _ in sizes))
            self.columns = {
                "weights": (self._matrices.numel, dtype),
                "affine": (self._affine.numel, torch.float32),
            }

    @property
    def row_bytes(self) -> int:
        """Bytes of the weights of one task."""
        return sum(width * dtype.itemsize for width, dtype in self.columns.values())

    def encode(self, flat: Tensor) -> Columns:
        """The columns, a row a task, of ``flat (n, P)``.

        Raises:
            ValueError: a finite value that the dtype turns into an infinite one, or for int8 any
                that is not finite.
        """
        if self.dtype != torch.int8:
            stored = flat.to(self.dtype)
            if self.dtype != flat.dtype and not torch.equal(stored.isfinite(), flat.isfinite()):
                raise ValueError(f"weights must fit into {self.dtype}, and some are too large")
            return (stored,)
        if not bool(flat.isfinite().all()):
            raise ValueError("weights must be finite to be stored as torch.int8")
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        matrices, affine = [], []
        for weight, bias in pairs(self.spec, flat):
            # A subnormal scale may be too coarse for its row; the clamp keeps the code in range.
            scale = (weight.abs().amax(-1) / 127).to(torch.float32)
            steps = weight / scale.masked_fill(scale == 0, 1).unsqueeze(-1)
            matrices.append(steps.round().clamp(-127, 127).to(torch.int8))
            rows = [scale] if bias is None else [scale, bias.to(torch.float32)]
            affine.append(torch.stack(rows, 1))
        return self._matrices.flatten(matrices), self._affine.flatten(affine)

    def decode(self, columns: Columns) -> Tensor:
        """The flat vectors ``(n, P)`` that ``columns`` hold, in the compute dtype."""
        if self.dtype != torch.int8:
            return columns[0]
        flat = columns[0].new_empty(len(columns[0]), self.spec.numel, dtype=self.compute)
        layers = zip(
            pairs(self.spec, flat),
            self._matrices.split(columns[0]),
            self._affine.split(columns[1]),
            strict=True,
        )
        for (weight, bias), steps, affine in layers:
            torch.mul(steps, affine[:, 0].unsqueeze(-1), out=weight)
            if bias is not None:
                bias.copy_(affine[:, 1])
        return flat

    def apply(
        self, activations: Sequence[nn.Module | None], columns: Columns, x: Tensor, rows: Tensor
    ) -> Tensor:
        """``x (R, in)`` of the compute dtype through the networks at ``rows`` of ``columns``."""
        if self.dtype != torch.int8 or self.spec.describe(activations) is not None:
            return apply(self.spec, activations, columns, x, rows)
        y = x.new_empty(len(x), self.spec.sizes[-1])
        for tasks, where, local in blocks(rows, max(1, BLOCK // self.spec.numel)):
            flat = self.decode(tuple(c.index_select(0, tasks) for c in columns))
            y[where] = stack(self.spec, activations, flat, x[where], local)
        return y


def apply(
    spec: MLPSpec,
    activations: Sequence[nn.Module | None],
    columns: Columns,
    x: Tensor,
    rows: Tensor,
) -> Tensor:
    """Stored networks on mixed rows: one op where kernels know all activations, else by layers;
    only the op takes int8."""
    text = spec.describe(activations)
    if text is None:
        return stack(spec, activations, columns[0], x, rows)
    return task_mlp(x, columns[0], columns[1] if len(columns) > 1 else None, rows, text)


def stack(
    spec: MLPSpec, activations: Sequence[nn.Module | None], flat: Tensor, x: Tensor, rows: Tensor
) -> Tensor:
    """The layers of stored networks one by one: row ``r`` of ``x (R, in)`` runs through the network
    of ``flat[rows[r]]``."""
    linears = [
        partial(task_linear, weight=weight, bias=bias, task_ids=rows)
        for weight, bias in pairs(spec, flat)
    ]
    return run_layers(x, linears, activations)


def pairs(spec: MLPSpec, flat: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of every layer, views of ``flat (n, P)``."""
    views = spec.split(flat)
    if not spec.bias:
        return [(weight, None) for weight in views]
    return list(zip(views[::2], views[1::2], strict=True))


class Guard(Protocol):
    """Checks rows of a column before their first use."""

    def __call__(self, rows: Tensor | None) -> None:
        """Raises if one of ``rows`` (``None``: any) is damaged."""


class Segment(NamedTuple):
    """Rows ``start, start + 1, ...`` of every column."""

    start: int
    columns: Columns
    guards: tuple[Guard, ...] = ()


class Store:
    """Rows of columns that grow, and whose content never changes under a reader.

    Rows are found through the bank's table, and the bank's lock is held around every change of the
    table and around :meth:`enter`, :meth:`leave`, :meth:`reserve`, :meth:`release` and
    :meth:`adopt`. Then no row is written while a reader may use it:

    - A reader enters, and copies its row numbers from the table, in one critical section. Entering
      notes the store's epoch.
    - A row is released in the critical section that takes it out of the table; this ends an epoch.
      Who enters later cannot have found the row. So the row may be reused as soon as every reader
      present entered after the epoch in which it was released; ``reserve`` waits for just that.
    - A reserved row is in no table until its content is complete; :meth:`write` needs no lock.

    ``segments`` is a tuple that is replaced, never changed: readers keep the one they saw.
    Rows of an adopted segment, mapped from a file, are never reused.

    Args:
        columns: width and dtype of every column.
        limit: the largest number of rows; ``reserve`` returns fewer where there are no more.
    """

    def __init__(
        self,
        columns: Sequence[tuple[int, torch.dtype]],
        device: torch.device,
        limit: int | None = None,
    ):
        self.columns = tuple(columns)
        self.device = device
        self.limit = limit
        self.segments: tuple[Segment, ...] = ()
        self.rows = 0
        self._adopted = 0
        self._free: list[Tensor] = []
        self._released: deque[tuple[int, Tensor]] = deque()
        self._epoch = 0
        self._readers: dict[object, int] = {}

    def enter(self) -> object:
        """Begins to read; give what it returns to :meth:`leave`."""
        reader = object()
        self._readers[reader] = self._epoch
        return reader

    def leave(self, reader: object) -> None:
        del self._readers[reader]

    def release(self, rows: Tensor) -> None:
        """Gives back rows that are in the table no more. Negative numbers stand for no row."""
        rows = rows[rows >= self._adopted]
        if len(rows):
            self._released.append((self._epoch, rows))
            self._epoch += 1

    def reserve(self, count: int) -> Tensor:
        """The numbers of ``count`` rows to write, of fewer if the limit is reached."""
        oldest = min(self._readers.values(), default=self._epoch)
        while self._released and self._released[0][0] < oldest:
            self._free.append(self._released.popleft()[1])
        taken = [torch.empty(0, dtype=torch.int64, device=self.device)]
        while count:
            if not self._free and not self._grow(count):
                break
            rows = self._free.pop()
            if len(rows) > count:
                self._free.append(rows[count:])
            taken.append(rows[:count])
            count -= len(taken[-1])
        return torch.cat(taken)

    def adopt(self, columns: Columns, guards: tuple[Guard, ...]) -> None:
        """Takes the tensors of a file as the first rows; only an empty store can."""
        self.rows = self._adopted = len(columns[0])
        if self.rows:
            self.segments = (Segment(0, columns, guards),)

    def _grow(self, count: int) -> bool:
        """More free rows: twice as many, at least ``count``, at most what the limit leaves."""
        own = self.rows - self._adopted
        more = max(count, own, 64)
        if self.limit is not None:
            more = min(more, self.limit - own)
        if more == 0:
            return False
        row_bytes = sum(width * dtype.itemsize for width, dtype in self.columns)
        # Merging would lose what another thread writes meanwhile to a segment that it copies. There
        # is none: who makes a store grow is its only writer, by the table's write lock or, where
        # there is a limit, by writing before it lets go of the lock that is held here.
        merge = own if own * row_bytes <= MERGE else 0
        columns = tuple(
            torch.empty(merge + more, width, dtype=dtype, device=self.device)
            for width, dtype in self.columns
        )
        kept = list(self.segments)
        if merge:
            for old in [s for s in kept if s.start >= self._adopted]:
                for column, values in zip(columns, old.columns, strict=True):
                    column[old.start - self._adopted :][: len(values)] = values
            kept = [s for s in kept if s.start < self._adopted]
        self.segments = (*kept, Segment(self.rows - merge, columns))
        self._free.append(torch.arange(self.rows, self.rows + more, device=self.device))
        self.rows += more
        return True

    def parts(self, rows: Tensor) -> Iterator[tuple[Columns, Tensor | None, Tensor]]:
        """``(columns, where, local)``: the rows at positions ``where`` of ``rows`` (``None``: all)
        are the rows ``local`` of ``columns``.

        Raises:
            BankFileError: a row that was mapped from a file is damaged.
        """
        segments = self.segments
        for n, segment in enumerate(segments):
            where, local = None, rows
            if len(segments) > 1:
                inside = rows >= segment.start
                if n + 1 < len(segments):
                    inside &= rows < segments[n + 1].start
                where = inside.nonzero().squeeze(1)
                if not len(where):
                    continue
                local = rows.index_select(0, where) - segment.start
            for guard in segment.guards:
                guard(local)
            yield segment.columns, where, local

    def column(self, n: int, rows: Tensor) -> Tensor:
        """A copy of ``rows`` of the column numbered ``n``."""
        width, dtype = self.columns[n]
        values = torch.empty(len(rows), width, dtype=dtype, device=self.device)
        for columns, where, local in self.parts(rows):
            if where is None:
                torch.index_select(columns[n], 0, local, out=values)
            else:
                values[where] = columns[n].index_select(0, local)
        return values

    def take(self, rows: Tensor) -> Columns:
        """A copy of ``rows`` of every column."""
        return tuple(self.column(n, rows) for n in range(len(self.columns)))

    def write(self, rows: Tensor, values: Columns) -> None:
        """Fills reserved rows."""
        for columns, where, local in self.parts(rows):
            for column, value in zip(columns, values, strict=True):
                column.index_copy_(0, local, value if where is None else value[where])

    def check(self) -> None:
        """Reads all that was mapped from a file.

        Raises:
            BankFileError: some of it is damaged.
        """
        for segment in self.segments:
            for guard in segment.guards:
                guard(None)
