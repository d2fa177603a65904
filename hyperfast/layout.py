"""Where every parameter of a target network lies in the flat vector that a hypernetwork emits."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from hyperfast import checks
from hyperfast.checks import Weights


@dataclass(frozen=True)
class ParamSpec:
    """An ordered list of parameter shapes and their layout, back to back, in one flat vector.

    Args:
        shapes: shape of each parameter, in the order in which they are laid out, row-major.
    """

    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def numels(self) -> tuple[int, ...]:
        """Number of elements of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def numel(self) -> int:
        """Length ``P`` of the flat vector."""
        return sum(self.numels)

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Views of ``flat (..., P)``, one a parameter, each of shape ``(..., *shape)``.

        Raises:
            ValueError: the last dimension of ``flat`` is not ``P``.
        """
        if flat.ndim == 0 or flat.shape[-1] != self.numel:
            raise ValueError(
                f"flat must have {self.numel} elements in its last dimension, "
                f"got shape {tuple(flat.shape)}"
            )
        pieces = flat.split(self.numels, dim=-1)
        # Splitting a dimension needs no copy, whatever its stride.
        return tuple(p.view((*p.shape[:-1], *s)) for p, s in zip(pieces, self.shapes, strict=True))

    def flatten(self, weights: Weights) -> Tensor:
        """The flat vector ``(..., P)`` that :meth:`split` would split into ``weights``.

        Raises:
            ValueError: wrong number of tensors, wrong shapes, or leading dimensions that disagree.
        """
        weights = checks.tensors("weights", weights)
        if len(weights) != len(self.shapes):
            raise ValueError(
                f"weights must hold {len(self.shapes)} tensors, one a parameter, got {len(weights)}"
            )
        batch = weights[0].shape[: weights[0].ndim - len(self.shapes[0])]
        for n, (w, shape) in enumerate(zip(weights, self.shapes, strict=True)):
            if w.shape != (*batch, *shape):
                raise ValueError(
                    f"weights[{n}] must have shape {(*batch, *shape)}, got {tuple(w.shape)}"
                )
        pieces = [w.reshape(*batch, n) for w, n in zip(weights, self.numels, strict=True)]
        return torch.cat(pieces, dim=-1)


@dataclass(frozen=True)
class LayerSpec:
    """One affine layer of an MLP: ``numel`` consecutive parameters, weight first, then bias."""

    in_features: int
    out_features: int
    bias: bool

    @property
    def weight_numel(self) -> int:
        return self.out_features * self.in_features

    @property
    def numel(self) -> int:
        return self.weight_numel + self.out_features * self.bias


class MLPSpec(ParamSpec):
    """Layout of an MLP's parameters: layer by layer, weight ``(out, in)`` row-major, then bias.

    Args:
        sizes: widths ``(in, hidden, ..., out)``, at least two.
        bias: whether every layer has a bias.

    Raises:
        TypeError: a width is not an int.
        ValueError: fewer than two widths, or a width below one.
    """

    sizes: tuple[int, ...]
    bias: bool

    def __init__(self, sizes: Sequence[int], bias: bool = True):
        if not isinstance(sizes, Iterable) or getattr(sizes, "ndim", None) == 0:
            raise TypeError(f"sizes must be a sequence of ints, got {sizes!r}")
        sizes = tuple(sizes)
        if len(sizes) < 2:
            raise ValueError(f"sizes must hold at least an input and an output width, got {sizes}")
        sizes = tuple(positive("sizes", s) for s in sizes)
        shapes: list[tuple[int, ...]] = []
        for i, o in pairwise(sizes):
            shapes += [(o, i), (o,)] if bias else [(o, i)]
        super().__init__(tuple(shapes))
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "bias", bool(bias))

    def __repr__(self) -> str:
        return f"MLPSpec(sizes={self.sizes}, bias={self.bias})"

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The layers, input side first."""
        return tuple(LayerSpec(i, o, self.bias) for i, o in pairwise(self.sizes))


def positive(name: str, value: int) -> int:
    """``value`` as an int, of at least 1; raises TypeError or ValueError naming ``name``."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number
