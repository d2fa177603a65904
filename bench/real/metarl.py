"""Meta-reinforcement learning with a generated policy (Beck et al. 2023): every step of every
environment has a latent of its own, and linear heads make the whole policy from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.real.real import Draw, Network, Real, Tensors, plain


@dataclass(frozen=True)
class MetaRL(Real):
    """Latents and states are leaves: an encoder each makes them."""

    about: ClassVar = "a meta-RL policy, 256-256-128-6, a network for every step"
    tasks: ClassVar = "batch"
    tiny: ClassVar = {"batch": 5, "z": 4, "state": 6, "first": 5, "second": 4, "actions": 3}

    batch: int = 3200
    z: int = 25
    state: int = 256
    first: int = 256
    second: int = 128
    actions: int = 6

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.state, self.first, self.second, self.actions

    def draw(self, draw: Draw) -> tuple[Tensors, Tensors]:
        leaves = {
            "z": draw.normal(self.batch, self.z),
            "state": draw.normal(self.batch, self.state),
        }
        for n, (i, o) in enumerate(pairwise(self.sizes)):
            for kind, count in (("w", o * i), ("b", o)):
                std = (2 * i) ** -0.5
                leaves[f"{kind}{n}.weight"] = draw.normal(count, self.z, std=std * self.z**-0.5)
                leaves[f"{kind}{n}.bias"] = draw.normal(count, std=std)
        return leaves, {}

    @property
    def width(self) -> int:
        return max(self.z, *self.sizes)

    @property
    def rows(self) -> int:
        return self.batch

    def _applied(self, p: Tensors, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The policy; `apply(weight (B, out, in), x (B, in))`."""
        y = p["state"]
        for n, (i, o) in enumerate(pairwise(self.sizes)):
            weight, bias = (
                linear(p["z"], p[f"{kind}{n}.weight"], p[f"{kind}{n}.bias"]) for kind in "wb"
            )
            y = apply(weight.view(-1, o, i), torch.tanh(y) if n else y) + bias
        return y

    def definition(self, p: Tensors, x: Tensors) -> Tensor:
        return self._applied(p, lambda weight, y: torch.bmm(weight, y.unsqueeze(2)).squeeze(2))

    def formula(self, leaves: Tensors) -> Network:
        """Published code multiplies elementwise, and sums."""

        def apply(weight: Tensor, y: Tensor) -> Tensor:
            return (y.unsqueeze(-1).expand_as(weight.mT) * weight.mT).sum(-2)

        return plain(lambda p, x: self._applied(p, apply), leaves)

    def shortcut(self, leaves: Tensors) -> Network:
        """bmm."""
        return plain(self.definition, leaves)

    def ours(self, leaves: Tensors) -> Network:
        from hyperfast import MLPSpec
        from hyperfast.functional import hyper_mlp

        spec = MLPSpec(self.sizes)
        heads = [f"{kind}{n}" for n in range(len(self.sizes) - 1) for kind in "wb"]
        activations = ["tanh", "tanh", None]
        own = {name: leaves[name] for name in ("z", "state")} | {
            part: torch.cat([leaves[f"{head}.{part}"] for head in heads])
            for part in ("weight", "bias")
        }

        def function(p: Tensors, x: Tensors) -> Tensor:
            return hyper_mlp(p["state"], p["z"], p["weight"], p["bias"], spec, activations)

        def back(g: Tensors) -> Tensors:
            pieces = [
                {f"{h}.{part}": t for h, t in zip(heads, g[part].split(spec.numels), strict=True)}
                for part in ("weight", "bias")
            ]
            return reduce(dict.__or__, pieces, g)

        network = plain(function, own)
        return Network(network.function, network.parameters, back)


WORKLOADS = (MetaRL("metarl_policy"),)
