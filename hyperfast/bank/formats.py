"""How the weights of a task are stored. A format is one class: its columns, there and back, and how
stored networks run; a row in :data:`FORMATS` gives it its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hyperfast.activations import activate, run_layers
from hyperfast.bank.rows import Columns
from hyperfast.functional import task_linear, task_mlp
from hyperfast.kernels.rows import blocks
from hyperfast.layout import MLPSpec, ParamSpec, transformed
from hyperfast.plans.sizes import BLOCK


class Format(ABC):
    """The flat weight vector ``(P,)`` of a task as one row in each of some columns.

    Attributes:
        spec: the layout of the flat vector.
        dtype: what users call the format.
        compute: the dtype in which stored networks run.
        columns: width and dtype of each, by the names that files give them.
        transform: of the matrices when they are applied, ``""`` for none; they are stored as given.
    """

    spec: MLPSpec
    transform: str
    dtype: torch.dtype
    compute: torch.dtype
    columns: dict[str, tuple[int, torch.dtype]]

    @abstractmethod
    def encode(self, flat: Tensor) -> Columns:
        """The columns, a row a task, of ``flat (n, P)``.

        Raises:
            ValueError: values that the format cannot hold.
        """

    @abstractmethod
    def decode(self, columns: Columns) -> Tensor:
        """The flat vectors ``(n, P)`` that ``columns`` hold, in the compute dtype."""

    def apply(
        self, activations: Sequence[nn.Module | None], columns: Columns, x: Tensor, index: Tensor
    ) -> Tensor:
        """``x (R, in)`` of the compute dtype through the networks at ``index (R,)`` of ``columns``;
        here, for a format that kernels do not know: decoded, a block of tasks at a time."""
        plain = Floats(self.spec, self.transform, self.compute)
        y = x.new_empty(len(x), self.spec.sizes[-1])
        for tasks, where, local in blocks(index, max(1, BLOCK // self.spec.numel)):
            flat = self.decode(tuple(column.index_select(0, tasks) for column in columns))
            y[where] = plain.apply(activations, (flat,), x[where], local)
        return y

    @property
    def task_bytes(self) -> int:
        """Bytes of the weights of one task."""
        return sum(width * dtype.itemsize for width, dtype in self.columns.values())


class Floats(Format):
    """A floating-point dtype: the one column ``weights (P,)``."""

    def __init__(self, spec: MLPSpec, transform: str, dtype: torch.dtype):
        self.spec, self.transform = spec, transform
        self.dtype = self.compute = dtype
        self.columns = {"weights": (spec.numel, dtype)}

    def encode(self, flat: Tensor) -> Columns:
        stored = flat.to(self.dtype)
        if self.dtype != flat.dtype and not torch.equal(stored.isfinite(), flat.isfinite()):
            raise ValueError(f"weights must fit into {self.dtype}, and some are too large")
        return (stored,)

    def decode(self, columns: Columns) -> Tensor:
        return columns[0]

    def apply(
        self, activations: Sequence[nn.Module | None], columns: Columns, x: Tensor, index: Tensor
    ) -> Tensor:
        text = self.spec.describe(activations, self.transform)
        if text is None:
            return run_by_layers(self.spec, activations, columns[0], x, index, self.transform)
        return task_mlp(x, columns[0], None, index, text)


class Int8(Format):
    """int8 with a scale for every output: ``W[o, i] = scale[o] * weights[o, i]``.

    Columns are ``weights``, the matrices of all layers back to back, and the scales and biases, of
    every layer the scales ``(out,)``, then the biases ``(out,)`` if it has any; files call these
    ``affine``.
    """

    dtype, compute = torch.int8, torch.float32

    def __init__(self, spec: MLPSpec, transform: str):
        self.spec, self.transform = spec, transform
        sizes = [(layer.out_features, layer.in_features) for layer in spec.layers]
        vectors = [(1 + bias, out) for (out, _), bias in zip(sizes, spec.biases, strict=True)]
        self._matrices = ParamSpec(tuple(sizes))
        self._scales_and_biases = ParamSpec(tuple(vectors))
        self.columns = {
            "weights": (self._matrices.numel, torch.int8),
            "affine": (self._scales_and_biases.numel, torch.float32),
        }

    def encode(self, flat: Tensor) -> Columns:
        if not bool(flat.isfinite().all()):
            raise ValueError("weights must be finite to be stored as torch.int8")
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        matrices, scales_and_biases = [], []
        for weight, bias in weight_bias_pairs(self.spec, flat):
            # A subnormal scale may be too coarse for its row; the clamp keeps the code in range.
            scale = (weight.abs().amax(-1) / 127).to(torch.float32)
            steps = weight / scale.masked_fill(scale == 0, 1).unsqueeze(-1)
            matrices.append(steps.round().clamp(-127, 127).to(torch.int8))
            both = [scale] if bias is None else [scale, bias.to(torch.float32)]
            scales_and_biases.append(torch.stack(both, 1))
            if not all(bool(t.isfinite().all()) for t in (127 * scale, both[-1])):
                raise ValueError(
                    "weights must fit into torch.int8 with scales and biases of float32"
                )
        return (
            self._matrices.flatten(matrices),
            self._scales_and_biases.flatten(scales_and_biases),
        )

    def decode(self, columns: Columns) -> Tensor:
        flat = columns[0].new_empty(len(columns[0]), self.spec.numel, dtype=self.compute)
        layers = zip(
            weight_bias_pairs(self.spec, flat),
            self._matrices.split(columns[0]),
            self._scales_and_biases.split(columns[1]),
            strict=True,
        )
        for (weight, bias), steps, both in layers:
            torch.mul(steps, both[:, 0].unsqueeze(-1), out=weight)
            if bias is not None:
                bias.copy_(both[:, 1])
        return flat

    def apply(
        self, activations: Sequence[nn.Module | None], columns: Columns, x: Tensor, index: Tensor
    ) -> Tensor:
        text = self.spec.describe(activations, self.transform)
        if text is None:
            return super().apply(activations, columns, x, index)
        return task_mlp(x, columns[0], columns[1], index, text)


def _floats(dtype: torch.dtype) -> Callable[[MLPSpec, str], Format]:
    return partial(Floats, dtype=dtype)


# By the names that files give them.
FORMATS: dict[str, Callable[[MLPSpec, str], Format]] = {
    "float32": _floats(torch.float32),
    "bfloat16": _floats(torch.bfloat16),
    "float16": _floats(torch.float16),
    "float64": _floats(torch.float64),
    "int8": Int8,
}


def format_of(spec: MLPSpec, dtype: torch.dtype | str, transform: str = "") -> Format:
    """The format of a dtype, or of a name in a file.

    Raises:
        TypeError: there is none.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in FORMATS:
        raise TypeError(f"dtype must be one of {[*FORMATS]}, got {dtype}")
    return FORMATS[name](spec, transform)


def name_of(format: Format) -> str:
    """The name of a format in a file."""
    return str(format.dtype).removeprefix("torch.")


def run_by_layers(
    spec: MLPSpec,
    activations: Sequence[nn.Module | None],
    flat: Tensor,
    x: Tensor,
    index: Tensor,
    transform: str,
) -> Tensor:
    """The layers of stored networks one by one: row ``r`` of ``x (R, in)`` runs through the network
    of ``flat[index[r]]``. A function may hold tensors of another dtype: what it returns is cast."""
    linears = [
        partial(task_linear, weight=transformed(transform, weight), bias=bias, task_ids=index)
        for weight, bias in weight_bias_pairs(spec, flat)
    ]

    def cast(activation: nn.Module | None, x: Tensor) -> Tensor:
        return activate(activation, x).to(flat.dtype)

    return run_layers(x, linears, [partial(cast, activation) for activation in activations])


def weight_bias_pairs(spec: MLPSpec, flat: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of every layer, views of ``flat (n, P)``."""
    views = iter(spec.split(flat))
    return [(next(views), next(views) if has_bias else None) for has_bias in spec.biases]
