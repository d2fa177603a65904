"""The sizes of a generated layer, and what a plan does and costs for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

PLANS = ("contract", "tile", "materialize")

# Elements of the temporaries of one block: 1 MB in fp32, half of a usual L2 cache.
BLOCK = 1 << 18


class Sizes(NamedTuple):
    """The sizes of one generated layer: ``rows`` in all, spread over ``tasks``."""

    tasks: int
    rows: int
    in_features: int
    out_features: int
    features: int
    ragged: bool = False
    bias: bool = True
    transform: bool = False

    @property
    def params(self) -> int:
        return self.out_features * (self.in_features + self.bias)


class Work(NamedTuple):
    """How much of each thing a plan does; or how many seconds one of each takes."""

    calls: float = 0  # one
    products: float = 0  # begun, one a block
    head: float = 0  # entries of the head's weight, as often as they are read
    outputs: float = 0  # of one row of every task
    generated: float = 0  # multiply-adds with features
    stored: float = 0  # entries of temporaries
    applied: float = 0  # multiply-adds of rows with weights
    spilled: float = 0  # bytes of temporaries that memory is mapped anew for

    def seconds(self, rates: Work) -> float:
        return sum(a * b for a, b in zip(self, rates, strict=True))


@dataclass(frozen=True)
class Cost:
    """What one plan takes for one layer, forward."""

    plan: str
    flops: int
    bytes: int
    extra_bytes: int
    seconds: float
