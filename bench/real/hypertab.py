"""HyperTab (Wydmanski et al. 2023): small tables are answered by many networks, each of some of the
table's columns, all made by one hypernetwork from the set of columns. Its package needs torchvision
built for the same torch, so its formula stands in."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.real.real import Draw, Network, Real, Tensors, plain


@dataclass(frozen=True)
class HyperTab(Real):
    """The table is data: no gradient."""

    about: ClassVar = "HyperTab, the mean of 100 networks of some columns each"
    tasks: ClassVar = "nets"
    tiny: ClassVar = {"nets": 3, "table": 5, "columns": 6, "own": 4, "trunk": 5}
    corner: ClassVar = "x"
    loops: ClassVar = True

    nets: int = 100
    table: int = 1000
    columns: int = 40
    own: int = 20
    hidden: int = 10
    classes: int = 2
    trunk: int = 64

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.own, self.hidden, self.hidden, self.classes

    def draw(self, draw: Draw) -> tuple[Tensors, Tensors]:
        sizes = self.sizes
        layers = list(pairwise(sizes))
        fan = torch.cat([torch.full((o * i + o,), float(i)) for i, o in layers])
        widths = (self.columns, 2 * self.trunk, self.trunk, self.trunk)
        leaves: Tensors = {}
        for n, (i, o) in enumerate(pairwise(widths)):
            leaves[f"{n}.weight"] = draw.linear(o, i, gain=2**0.5)
            leaves[f"{n}.bias"] = draw.normal(o, std=0.1)
        head = draw.normal(len(fan), self.trunk)
        leaves["head.weight"] = head / (fan * self.trunk).sqrt()[:, None]
        leaves["head.bias"] = draw.normal(len(fan)) / fan.sqrt()
        chosen = [
            sorted(draw.integers.sample(range(self.columns), self.own)) for _ in range(self.nets)
        ]
        mask = [[float(c in some) for c in range(self.columns)] for some in chosen]
        return leaves, {
            "x": draw.normal(self.table, self.columns),
            "chosen": torch.tensor(chosen),
            "mask": torch.tensor(mask, dtype=torch.float64),
        }

    def corners(self, t: Tensors) -> Tensor:
        """Of the nets. The trunk runs 100 times only: one of its corners is hardly ever near."""
        rows, near = t["x"].mT[t["chosen"]].mT, []
        pairs = self.weights(t, t)
        for weight, bias in pairs[:-1]:
            pre = torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
            near.append(pre.abs().amin((0, 2)))
            rows = pre.relu()
        return torch.stack(near).amin(0).unsqueeze(1)

    @property
    def width(self) -> int:
        return max(self.columns, 2 * self.trunk, self.nets)

    @property
    def rows(self) -> int:
        return self.nets * self.table

    def flat(self, p: Tensors, x: Tensors) -> Tensor:
        """(nets, P): the trunk's last layer is linear."""
        h = x["mask"]
        for n in range(3):
            h = linear(h if n == 0 else h.relu(), p[f"{n}.weight"], p[f"{n}.bias"])
        return linear(h, p["head.weight"], p["head.bias"])

    def weights(self, p: Tensors, x: Tensors) -> list[tuple[Tensor, Tensor]]:
        layers = list(pairwise(self.sizes))
        pieces = self.flat(p, x).split([n for i, o in layers for n in (o * i, o)], 1)
        matrices = [m.unflatten(1, (o, i)) for m, (i, o) in zip(pieces[::2], layers, strict=True)]
        return list(zip(matrices, pieces[1::2], strict=True))

    def definition(self, p: Tensors, x: Tensors) -> Tensor:
        rows = x["x"].mT[x["chosen"]].mT
        for n, (weight, bias) in enumerate(self.weights(p, x)):
            rows = torch.baddbmm(bias.unsqueeze(1), rows.relu() if n else rows, weight.mT)
        return rows.mean(0)

    def formula(self, leaves: Tensors) -> Network:
        """Net after net."""

        def function(p: Tensors, x: Tensors) -> Tensor:
            nets = zip(*(t.unbind() for pair in self.weights(p, x) for t in pair), strict=True)
            total = x["x"].new_zeros(self.table, self.classes)
            for columns, (w_0, b_0, w_1, b_1, w_2, b_2) in zip(x["chosen"], nets, strict=True):
                h = linear(x["x"][:, columns], w_0, b_0).relu()
                total = total + linear(linear(h, w_1, b_1).relu(), w_2, b_2)
            return total / self.nets

        return plain(function, leaves)

    def shortcut(self, leaves: Tensors) -> Network:
        """baddbmm."""
        return plain(self.definition, leaves)

    def ours(self, leaves: Tensors) -> Network:
        from hyperfast import MLPSpec, TargetNet

        spec, target = MLPSpec(self.sizes), TargetNet("relu")

        def function(p: Tensors, x: Tensors) -> Tensor:
            rows = x["x"].mT[x["chosen"]].mT
            return target(rows, spec.split(self.flat(p, x))).mean(0)

        return plain(function, leaves)


WORKLOADS = (HyperTab("hypertab"),)
