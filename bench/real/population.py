"""A population of policies, one row each, as evolution strategies hold them: flat vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from bench.absent import require
from bench.real.real import Draw, Network, Real, Tensors, adopt, plain


@dataclass(frozen=True)
class Population(Real):
    """The vectors are the leaf."""

    about: ClassVar = "a population of 10,000 policies 24-64-6, a row each"
    tasks: ClassVar = "nets"
    tiny: ClassVar = {"nets": 5, "observation": 4, "hidden": 7, "actions": 3}

    nets: int = 10_000
    observation: int = 24
    hidden: int = 64
    actions: int = 6

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.observation, self.hidden, self.actions

    @property
    def pieces(self) -> tuple[int, int, int, int]:
        i, h, o = self.sizes
        return h * i, h, o * h, o

    def draw(self, draw: Draw) -> tuple[Tensors, Tensors]:
        i, h, o = self.sizes
        fan = [i] * (h * i + h) + [h] * (o * h + o)
        scale = torch.tensor(fan, dtype=torch.float64).rsqrt()
        flat = draw.normal(self.nets, len(fan)) * scale
        return {"flat": flat}, {"x": draw.normal(self.nets, i)}

    @property
    def width(self) -> int:
        return max(self.sizes)

    @property
    def rows(self) -> int:
        return 1

    def policy(self) -> nn.Sequential:
        i, h, o = self.sizes
        return nn.Sequential(nn.Linear(i, h), nn.Tanh(), nn.Linear(h, o))

    def weights(self, flat: Tensor) -> list[Tensor]:
        i, h, o = self.sizes
        w_0, b_0, w_1, b_1 = flat.split(self.pieces, 1)
        return [w_0.unflatten(1, (h, i)), b_0, w_1.unflatten(1, (o, h)), b_1]

    def definition(self, p: Tensors, x: Tensors) -> Tensor:
        w_0, b_0, w_1, b_1 = self.weights(p["flat"])
        h = torch.baddbmm(b_0.unsqueeze(1), x["x"].unsqueeze(1), w_0.mT).tanh()
        return torch.baddbmm(b_1.unsqueeze(1), h, w_1.mT).squeeze(1)

    def formula(self, leaves: Tensors) -> Network:
        """vmap(functional_call)."""
        policy = self.policy().to("meta")
        names = [name for name, _ in policy.named_parameters()]
        apply = vmap(lambda parameters, x: functional_call(policy, parameters, (x,)))

        def function(p: Tensors, x: Tensors) -> Tensor:
            return apply(dict(zip(names, self.weights(p["flat"]), strict=True)), x["x"])

        return plain(function, leaves)

    def shortcut(self, leaves: Tensors) -> Network:
        """baddbmm."""
        return plain(self.definition, leaves)

    def package(self, leaves: Tensors) -> Network:
        make = require("evotorch.neuroevolution.net.functional").make_functional_module
        apply = vmap(make(self.policy()))
        return plain(lambda p, x: apply(p["flat"], x["x"]), leaves)

    def ours(self, leaves: Tensors) -> Network:
        from hyperfast import TaskMLP

        net = TaskMLP(self.nets, *self.sizes, activation="tanh")
        own = adopt(net, leaves, {"flat": "weight"})
        return Network(lambda x: net(x["x"]), own)


WORKLOADS = (Population("population"),)
