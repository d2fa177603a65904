"""DLinear with `individual` layers (Zeng et al. 2023), a forecaster: every channel has a linear
layer for its trend and one for the rest. Sizes of the traffic data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, linear, pad

from bench.real.real import Draw, Network, Real, Tensors, adopt, plain

PARTS = ("seasonal", "trend")


@dataclass(frozen=True)
class DLinear(Real):
    """The series are data: no gradient."""

    about: ClassVar = "DLinear, two linear layers for each of 862 channels"
    tasks: ClassVar = "channels"
    tiny: ClassVar = {"channels": 3, "batch": 4, "past": 30, "future": 5}
    loops: ClassVar = True

    channels: int = 862
    batch: int = 16
    past: int = 336
    future: int = 96
    window: int = 25

    def draw(self, draw: Draw) -> tuple[Tensors, Tensors]:
        leaves = {}
        for part in PARTS:
            shape = self.channels, self.future
            leaves[f"{part}.weight"] = draw.normal(*shape, self.past, std=self.past**-0.5)
            leaves[f"{part}.bias"] = draw.normal(*shape, std=0.1)
        return leaves, {"x": draw.normal(self.batch, self.past, self.channels)}

    @property
    def width(self) -> int:
        return 2 * self.past

    @property
    def rows(self) -> int:
        return self.batch

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, past, channels) -> the rest and the trend, (batch, channels, past) each."""
        x, side = x.mT, (self.window - 1) // 2
        trend = avg_pool1d(pad(x, (side, side), mode="replicate"), self.window, stride=1)
        return x - trend, trend

    def definition(self, p: Tensors, x: Tensors) -> Tensor:
        made = zip(PARTS, self.parts(x["x"]), strict=True)
        terms = [
            torch.einsum("bci,coi->boc", t, p[f"{part}.weight"]) + p[f"{part}.bias"].mT
            for part, t in made
        ]
        return terms[0] + terms[1]

    def formula(self, leaves: Tensors) -> Network:
        """Channel after channel, each with parameters of its own."""
        own = {
            f"{channel}.{name}": value.clone().requires_grad_()
            for name, leaf in leaves.items()
            for channel, value in enumerate(leaf)
        }

        def function(x: Tensors) -> Tensor:
            made = dict(zip(PARTS, self.parts(x["x"]), strict=True))
            y = x["x"].new_zeros(self.batch, self.channels, self.future)
            for channel in range(self.channels):
                terms = [
                    linear(
                        t[:, channel],
                        own[f"{channel}.{part}.weight"],
                        own[f"{channel}.{part}.bias"],
                    )
                    for part, t in made.items()
                ]
                y[:, channel] = terms[0] + terms[1]
            return y.mT

        def back(g: Tensors) -> Tensors:
            every = range(self.channels)
            return {name: torch.stack([g[f"{c}.{name}"] for c in every]) for name in leaves}

        return Network(function, own, back)

    def shortcut(self, leaves: Tensors) -> Network:
        """baddbmm."""

        def function(p: Tensors, x: Tensors) -> Tensor:
            made = zip(PARTS, self.parts(x["x"]), strict=True)
            terms = [
                torch.baddbmm(
                    p[f"{part}.bias"].unsqueeze(1), t.transpose(0, 1), p[f"{part}.weight"].mT
                )
                for part, t in made
            ]
            return (terms[0] + terms[1]).permute(1, 2, 0)

        return plain(function, leaves)

    def ours(self, leaves: Tensors) -> Network:
        from hyperfast import TaskLinear

        layers = nn.ModuleDict(
            {part: TaskLinear(self.channels, self.past, self.future) for part in PARTS}
        )
        own = adopt(layers, leaves)

        def function(x: Tensors) -> Tensor:
            made = zip(PARTS, self.parts(x["x"]), strict=True)
            terms = [layers[part](t.transpose(0, 1)) for part, t in made]
            return (terms[0] + terms[1]).permute(1, 2, 0)

        return Network(function, own)


WORKLOADS = (DLinear("dlinear_individual"),)
