"""Pools of weights (K, in, out) and of biases (K, out), as graph networks of traffic keep them, and
the one head (P, K) of a HyperLinear of layout "io" in which they lie."""

from __future__ import annotations

import torch
from torch import Tensor


def joined(weights: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([weights.flatten(1), bias], 1).mT.contiguous()


def split(name: str, head: Tensor, ins: int) -> dict[str, Tensor]:
    """What `joined` joined, as `name.weights` and `name.bias`."""
    out = len(head) // (ins + 1)
    weights, bias = head.mT.split([ins * out, out], 1)
    return {f"{name}.weights": weights.unflatten(1, (ins, out)), f"{name}.bias": bias}
