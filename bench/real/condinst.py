"""The mask heads of CondInst (Tian et al. 2020): a tiny network for every instance in an image runs
on every pixel, with the pixel's place relative to the instance."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from bench.real.real import Draw, Network, Real, Tensors, plain


@dataclass(frozen=True)
class CondInst(Real):
    """The weights of an instance and the features of an image are leaves, for other layers made
    them. In the vector of an instance all matrices come first, then all biases."""

    about: ClassVar = "CondInst's mask heads, 10-8-8-1 on every pixel"
    tasks: ClassVar = "images"
    tiny: ClassVar = {"images": 2, "instances": 3, "height": 4, "breadth": 5}
    corner: ClassVar = "features"

    images: int = 2
    instances: int = 50
    height: int = 100
    breadth: int = 167
    channels: int = 8

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.channels + 2, 8, 8, 1

    @property
    def heads(self) -> int:
        return self.images * self.instances

    def draw(self, draw: Draw) -> tuple[Tensors, Tensors]:
        layers = list(pairwise(self.sizes))
        fan = [i for i, o in layers for _ in range(i * o)]
        scale = torch.tensor(fan + [100] * sum(self.sizes[1:]), dtype=torch.float64).rsqrt()
        leaves = {
            "weights": draw.normal(self.heads, len(scale)) * scale,
            "features": draw.normal(self.images, self.channels, self.height, self.breadth),
        }
        return leaves, {
            "place": draw.normal(self.heads, 2),
            "image": torch.arange(self.images).repeat_interleave(self.instances),
        }

    @property
    def width(self) -> int:
        return max(self.sizes)

    @property
    def rows(self) -> int:
        return self.instances * self.height * self.breadth

    def pixels(self, p: Tensors, x: Tensors) -> Tensor:
        """(heads, channels + 2, height * breadth): features, and places relative to the head's."""
        lines = [torch.linspace(-1, 1, n).to(x["place"]) for n in (self.height, self.breadth)]
        grid = torch.stack(torch.meshgrid(*lines, indexing="ij")).flatten(1)
        relative = x["place"].unsqueeze(2) - grid
        return torch.cat([relative, p["features"].flatten(2)[x["image"]]], 1)

    def layers(self, p: Tensors) -> list[tuple[Tensor, Tensor]]:
        pairs = list(pairwise(self.sizes))
        pieces = p["weights"].split([i * o for i, o in pairs] + [o for _, o in pairs], 1)
        matrices = [m.unflatten(1, (o, i)) for m, (i, o) in zip(pieces, pairs, strict=False)]
        return list(zip(matrices, pieces[len(pairs) :], strict=True))

    def corners(self, t: Tensors) -> Tensor:
        values, near = self.pixels(t, t), []
        for weight, bias in self.layers(t)[:-1]:
            pre = torch.baddbmm(bias.unsqueeze(2), weight, values)
            near.append(pre.abs().amin(1))
            values = pre.relu()
        per_image = torch.minimum(*near).view(self.images, self.instances, -1).amin(1)
        return per_image.view(self.images, 1, self.height, self.breadth)

    def image(self, flat: Tensor) -> Tensor:
        return flat.view(self.heads, self.height, self.breadth)

    def definition(self, p: Tensors, x: Tensors) -> Tensor:
        values = self.pixels(p, x)
        for n, (weight, bias) in enumerate(self.layers(p)):
            values = values.relu() if n else values
            values = torch.baddbmm(bias.unsqueeze(2), weight, values)
        return self.image(values)

    def formula(self, leaves: Tensors) -> Network:
        """A convolution in as many groups as there are heads."""

        def function(p: Tensors, x: Tensors) -> Tensor:
            values = self.pixels(p, x).view(1, -1, self.height, self.breadth)
            for n, (weight, bias) in enumerate(self.layers(p)):
                kernel = weight.reshape(-1, weight.shape[2], 1, 1)
                values = values.relu() if n else values
                values = conv2d(values, kernel, bias.reshape(-1), groups=self.heads)
            return self.image(values)

        return plain(function, leaves)

    def shortcut(self, leaves: Tensors) -> Network:
        """baddbmm."""
        return plain(self.definition, leaves)

    def ours(self, leaves: Tensors) -> Network:
        from hyperfast import TargetNet

        target = TargetNet("relu")

        def function(p: Tensors, x: Tensors) -> Tensor:
            weights = [t for pair in self.layers(p) for t in pair]
            return self.image(target(self.pixels(p, x).mT, weights))

        return plain(function, leaves)


WORKLOADS = (CondInst("condinst"),)
