"""What a head makes of features for one layer, and how that is applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from hyperfast.functional import Destinations, generated_linear
from hyperfast.layout import (
    LAYOUTS,
    Generated,
    ParamSpec,
    Transform,
    check_transform,
    positive,
    text_of_one,
    transformed,
)
from hyperfast.plans.sizes import Sizes

Bias: TypeAlias = bool | str | None
BIASES = ("generated", "shared", None)  # True is the first, False the last


class Rows(NamedTuple):
    """What one generated tensor is made of: features, and the head's rows for it."""

    h: Tensor  # (B, K)
    weight: Tensor  # (numel, K)
    bias: Tensor | None  # (numel,)


@dataclass(frozen=True)
class LayerHead:
    """The generated part of one layer, ``W_b x + c_b``.

    Its tensors, in the order of the head's rows: the matrix ``(out, in)``, or with a rank its
    factors ``A (rank, in)`` and ``B (out, rank)``, ``W_b = B_b A_b``; then a generated bias
    ``(out,)``. In layout ``"io"`` the dimensions of matrices are exchanged.

    Raises:
        TypeError: a size that is not an int, a transform that cannot be called.
        ValueError: a size or rank below one, an unknown bias, transform or layout, a transform of
            a matrix of low rank, whose entries are never formed.
    """

    in_features: int
    out_features: int
    bias: Bias = "generated"
    transform: Transform | None = None
    rank: int | None = None
    layout: str = "oi"
    spec: ParamSpec = field(init=False, repr=False, compare=False)  # of what is generated

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features", *(() if self.rank is None else ("rank",))):
            object.__setattr__(self, name, positive(name, getattr(self, name)))
        if isinstance(self.bias, bool):
            object.__setattr__(self, "bias", "generated" if self.bias else None)
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {[True, False, *BIASES]}, got {self.bias!r}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {list(LAYOUTS)}, got {self.layout!r}")
        check_transform("transform", self.transform)
        if self.rank is not None and self.transform is not None:
            raise ValueError(
                f"transform must be None for a matrix of rank {self.rank}, whose entries are never "
                f"formed, got {self.transform!r}"
            )
        out, ins = self.out_features, self.in_features
        matrices = [(out, ins)] if self.rank is None else [(self.rank, ins), (out, self.rank)]
        if self.layout == "io":
            matrices = [shape[::-1] for shape in matrices]
        spec = ParamSpec((*matrices, *([(out,)] if self.bias == "generated" else [])))
        object.__setattr__(self, "spec", spec)

    @property
    def plain(self) -> bool:
        """Whether what is generated are the weights themselves, one after the other."""
        shared = self.bias == "shared" or self.layout == "io"
        return self.rank is None and self.transform is None and not shared

    @property
    def network(self) -> str | None:
        """The text of the network of this layer alone, if a network's head can be its own."""
        if not isinstance(self.transform, str | None) or self.rank or self.layout != "oi":
            return None
        if self.bias == "shared":
            return None
        has_bias = self.bias == "generated"
        return text_of_one(self.in_features, self.out_features, has_bias, self.transform or "")

    def check_base(self) -> None:
        """Raises ValueError where the layer cannot start as its base, generating zero."""
        if self.transform in ("exp", "softplus"):
            raise ValueError(
                "transform must generate zeros beside a base, from which the layer starts, "
                f"got {self.transform!r}"
            )

    def sizes(
        self, tasks: int, rows: int, features: int, ragged: bool, transform: bool
    ) -> list[Sizes]:
        """Of each op that :meth:`apply` runs, of features that all tensors share."""
        out, bias = self.out_features, self.bias == "generated"
        if self.rank is None:
            return [Sizes(tasks, rows, self.in_features, out, features, ragged, bias, transform)]
        first = Sizes(tasks, rows, self.in_features, self.rank, features, ragged, False)
        return [first, Sizes(tasks, rows, self.rank, out, features, ragged, bias)]

    def weights(self, flat: Tensor) -> tuple[Tensor, Tensor | None]:
        """The matrix ``(..., out, in)`` and the bias ``(..., out)`` in ``flat (..., numel)``."""
        tensors = list(self.spec.split(flat))
        bias = tensors.pop() if self.bias == "generated" else None
        if self.layout == "io":
            tensors = [w.mT for w in tensors]
        if self.rank is not None:
            return tensors[1] @ tensors[0], bias
        return transformed(self.transform, tensors[0], "transform"), bias

    def apply(
        self,
        x: Tensor,
        rows: Sequence[Rows],
        shared_bias: Tensor | None = None,
        task_ids: Tensor | None = None,
        by: Destinations | None = None,
    ) -> Tensor:
        """``W_b x + c_b``, without forming the weights where that pays.

        Args:
            x: as of :func:`hyperfast.functional.hyper_linear`.
            rows: of every generated tensor; its features may be those of another, or its own.
            shared_bias: ``(out,)``, the bias of all tasks where it is not generated.
        """
        first, *others = rows
        if self.rank is not None:
            x = generated_linear(x, first.h, self._made(first, self.in_features), task_ids)
            first, *others = others
        made = self._made(first, self.in_features if self.rank is None else self.rank)
        if not others:
            made = made._replace(vector_bias=shared_bias)
            return generated_linear(x, first.h, made, task_ids, self.transform, by)
        (bias,) = others
        if bias.h is first.h:
            made = made._replace(vector=bias.weight, vector_bias=bias.bias)
            return generated_linear(x, first.h, made, task_ids, self.transform, by)
        y = generated_linear(x, first.h, made, task_ids, self.transform)
        c = F.linear(bias.h, bias.weight, bias.bias)
        if task_ids is not None:
            c = c.index_select(0, task_ids)
        y = y + (c if c.ndim == y.ndim else c.unsqueeze(1))
        return y if by is None else by.reduce(y)

    def _made(self, rows: Rows, ins: int) -> Generated:
        return Generated.of_head(rows.weight, rows.bias, ins, False, self.layout)


def cut(h: Tensor, weight: Tensor, bias: Tensor | None, spec: ParamSpec) -> list[Rows]:
    """The rows of a head that makes the tensors of ``spec`` of the same features."""
    biases = [None] * len(spec.numels) if bias is None else bias.split(spec.numels)
    pieces = zip(weight.split(spec.numels), biases, strict=True)
    return [Rows(h, w, b) for w, b in pieces]
