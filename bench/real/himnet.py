"""HimNet (Dong et al. 2024) forecasts traffic: every sensor at every time has matrices of its own,
made from an embedding. One step of its decoder, a GRU over graph convolutions; sizes of METR-LA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench.real.pools import joined, split
from bench.real.real import Draw, Network, Real, Tensors, adopt, fresh


@dataclass(frozen=True)
class HimNet(Real):
    """The state is a leaf, for the steps before made it, and so is the embedding."""

    about: ClassVar = "HimNet, a decoder step: a matrix for every sensor and sample"
    tasks: ClassVar = "batch"
    tiny: ClassVar = {"batch": 2, "sensors": 3, "state": 4, "embedding": 3}

    batch: int = 16
    sensors: int = 207
    inputs: int = 3
    state: int = 64
    embedding: int = 16

    def draw(self, draw: Draw) -> tuple[Tensors, Tensors]:
        ins, S, K = 2 * (self.inputs + self.state), self.state, self.embedding
        std = (K * ins) ** -0.5
        leaves = {
            "embedding": draw.normal(self.batch, self.sensors, K),
            "state": draw.normal(self.batch, self.sensors, S, std=0.5),
            "gate.weights": draw.normal(K, ins, 2 * S, std=std),
            "gate.bias": draw.normal(K, 2 * S, std=0.1),
            "update.weights": draw.normal(K, ins, S, std=std),
            "update.bias": draw.normal(K, S, std=0.1),
        }
        graph = draw.normal(self.sensors, self.sensors).softmax(-1)
        return leaves, {"x": draw.normal(self.batch, self.sensors, self.inputs), "graph": graph}

    @property
    def width(self) -> int:
        return max(2 * (self.inputs + self.state), self.sensors)

    @property
    def rows(self) -> int:
        return self.batch * self.sensors

    def definition(self, p: Tensors, x: Tensors) -> Tensor:
        def conv(rows: Tensor, name: str) -> Tensor:
            weight = torch.einsum("bnd,dio->bnio", p["embedding"], p[f"{name}.weights"])
            bias = p["embedding"] @ p[f"{name}.bias"]
            return torch.einsum("bni,bnio->bno", self.neighbours(rows, x), weight) + bias

        return self.step(p, x, conv)

    def neighbours(self, rows: Tensor, x: Tensors) -> Tensor:
        """Every sensor's own values beside the mean of the graph's."""
        return torch.cat([rows, x["graph"] @ rows], -1)

    def step(self, p: Tensors, x: Tensors, conv: Callable[[Tensor, str], Tensor]) -> Tensor:
        """The GRU; `conv(rows, name)`."""
        state = p["state"]
        gates = torch.sigmoid(conv(torch.cat([x["x"], state], -1), "gate"))
        z, r = gates.split(self.state, -1)
        candidate = torch.tanh(conv(torch.cat([x["x"], z * state], -1), "update"))
        return r * state + (1 - r) * candidate

    def ours(self, leaves: Tensors) -> Network:
        from hyperfast import HyperLinear

        own = fresh({"embedding": leaves["embedding"], "state": leaves["state"]})
        ins, layers = 2 * (self.inputs + self.state), {}
        for name, out in (("gate", 2 * self.state), ("update", self.state)):
            layer = HyperLinear(ins, out, self.embedding, head_bias=False, layout="io")
            head = joined(leaves[f"{name}.weights"], leaves[f"{name}.bias"])
            own |= adopt(layer, {name: head}, {name: "head.weight"})
            layers[name] = layer

        def function(x: Tensors) -> Tensor:
            def conv(rows: Tensor, name: str) -> Tensor:
                return layers[name](self.neighbours(rows, x), own["embedding"])

            return self.step(own, x, conv)

        def back(g: Tensors) -> Tensors:
            return g | split("gate", g["gate"], ins) | split("update", g["update"], ins)

        return Network(function, own, back)


WORKLOADS = (HimNet("himnet_step"),)
