"""Sines on coordinates, all weights from a latent (Sitzmann et al. 2020): every tensor of the
target has a hypernetwork of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.real.real import Draw, Network, Real, Tensors, plain


@dataclass(frozen=True)
class SirenHyper(Real):
    """The latents are a leaf."""

    about: ClassVar = "SIREN 2-256x4-3, a hypernetwork for every tensor of it"
    tasks: ClassVar = "images"
    tiny: ClassVar = {"images": 2, "points": 5, "hidden": 6, "hyper": 4}
    corner: ClassVar = "z"

    images: int = 16
    points: int = 1024
    hidden: int = 256
    hyper: int = 256
    colours: int = 3
    frequency: int = 30

    @property
    def layers(self) -> list[tuple[int, int]]:
        H = self.hidden
        return [(2, H), (H, H), (H, H), (H, H), (H, self.colours)]

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {
            name: shape
            for n, (i, o) in enumerate(self.layers)
            for name, shape in ((f"w{n}", (o, i)), (f"b{n}", (o,)))
        }

    def draw(self, draw: Draw) -> tuple[Tensors, Tensors]:
        K = self.hyper
        leaves = {"z": draw.normal(self.images, K)}
        for name, shape in self.tensors.items():
            ins = self.layers[int(name[1])][0]
            for n in range(2):
                leaves[f"{name}.{n}.weight"] = draw.linear(K, K, gain=2**0.5)
                leaves[f"{name}.{n}.bias"] = draw.normal(K, std=0.1)
            # As SIREN starts: sines of about a radian after the first layer, of many in it.
            std = (3**-0.5 if name.endswith("0") else 2**0.5) * ins**-0.5
            std = std / (1 if name.endswith("0") else self.frequency) / 2**0.5
            count = torch.Size(shape).numel()
            leaves[f"{name}.2.weight"] = draw.normal(count, K, std=std * K**-0.5)
            leaves[f"{name}.2.bias"] = draw.normal(count, std=std)
        return leaves, {"x": draw.normal(self.images, self.points, 2, std=0.5)}

    def corners(self, t: Tensors) -> Tensor:
        near = []
        for name in self.tensors:
            h = t["z"]
            for n in range(2):
                pre = linear(h.relu() if n else h, t[f"{name}.{n}.weight"], t[f"{name}.{n}.bias"])
                near.append(pre.abs().amin(1))
                h = pre
        return torch.stack(near).amin(0).unsqueeze(1)

    @property
    def width(self) -> int:
        # A sine multiplies a rounding of the sum before it by the frequency.
        return self.frequency**2 * max(self.hidden, self.hyper)

    @property
    def rows(self) -> int:
        return self.images * self.points

    def features(self, p: Tensors, name: str) -> Tensor:
        h = p["z"]
        for n in range(2):
            h = linear(h, p[f"{name}.{n}.weight"], p[f"{name}.{n}.bias"]).relu()
        return h

    def made(self, p: Tensors, name: str) -> Tensor:
        """(images, *shape)."""
        flat = linear(self.features(p, name), p[f"{name}.2.weight"], p[f"{name}.2.bias"])
        return flat.unflatten(1, self.tensors[name])

    def sines(self, x: Tensor, layer: Callable[[Tensor, int], Tensor]) -> Tensor:
        """`layer(x, n)`."""
        for n in range(len(self.layers)):
            x = layer(torch.sin(self.frequency * x) if n else x, n)
        return x

    def definition(self, p: Tensors, x: Tensors) -> Tensor:
        def layer(rows: Tensor, n: int) -> Tensor:
            weight, bias = self.made(p, f"w{n}"), self.made(p, f"b{n}")
            return torch.matmul(rows, weight.mT) + bias.unsqueeze(1)

        return self.sines(x["x"], layer)

    def ours(self, leaves: Tensors) -> Network:
        from hyperfast.functional import hyper_linear

        def function(p: Tensors, x: Tensors) -> Tensor:
            def layer(rows: Tensor, n: int) -> Tensor:
                head = p[f"w{n}.2.weight"], p[f"w{n}.2.bias"]
                y = hyper_linear(rows, self.features(p, f"w{n}"), *head, target_bias=False)
                return y + self.made(p, f"b{n}").unsqueeze(1)

            return self.sines(x["x"], layer)

        return plain(function, leaves)


WORKLOADS = (SirenHyper("siren_hyper"),)
