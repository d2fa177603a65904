"""The graph convolution of AGCRN (Bai et al. 2020), which forecasts traffic: every sensor has a
matrix of its own, made from its embedding; embeddings make the graph too. Sizes of PEMS04."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, relu, softmax

from bench.real.pools import joined, split
from bench.real.real import Draw, Network, Real, Tensors, adopt, fresh, plain


@dataclass(frozen=True)
class AGCRN(Real):
    """The rows are a leaf: input and state of a recurrent network."""

    about: ClassVar = "AGCRN's graph convolution, a matrix for every sensor"
    tasks: ClassVar = "sensors"
    tiny: ClassVar = {"sensors": 5, "batch": 3, "ins": 4, "out": 6, "embedding": 3}
    corner: ClassVar = "embedding"

    sensors: int = 307
    batch: int = 64
    ins: int = 65
    out: int = 128
    embedding: int = 10

    def draw(self, draw: Draw) -> tuple[Tensors, Tensors]:
        K, ins = self.embedding, 2 * self.ins
        leaves = {
            "rows": draw.normal(self.batch, self.sensors, self.ins),
            "embedding": draw.normal(self.sensors, K),
            "pool.weights": draw.normal(K, ins, self.out, std=(K * ins) ** -0.5),
            "pool.bias": draw.normal(K, self.out, std=0.1),
        }
        return leaves, {}

    def corners(self, t: Tensors) -> Tensor:
        pre = t["embedding"] @ t["embedding"].mT
        return pre.abs().amin(1, keepdim=True)

    @property
    def width(self) -> int:
        return max(2 * self.ins, self.sensors)

    @property
    def rows(self) -> int:
        return self.sensors * self.batch

    def neighbours(self, p: Tensors) -> Tensor:
        """(batch, sensors, 2 * ins): every sensor's own values beside those of its graph."""
        graph = (p["embedding"] @ p["embedding"].mT).relu().softmax(1)
        return torch.cat([p["rows"], graph @ p["rows"]], -1)

    def definition(self, p: Tensors, x: Tensors) -> Tensor:
        weight = torch.einsum("nk,kio->nio", p["embedding"], p["pool.weights"])
        bias = p["embedding"] @ p["pool.bias"]
        return torch.einsum("bni,nio->bno", self.neighbours(p), weight) + bias

    def formula(self, leaves: Tensors) -> Network:
        """The graph beside the identity, whose product is computed too."""

        def function(p: Tensors, x: Tensors) -> Tensor:
            embedding = p["embedding"]
            graph = softmax(relu(embedding @ embedding.mT), 1)
            supports = torch.stack([torch.eye(self.sensors, dtype=graph.dtype), graph])
            weight = torch.einsum(
                "nd,dkio->nkio", embedding, p["pool.weights"].unflatten(1, (2, -1))
            )
            rows = torch.einsum("knm,bmc->bknc", supports, p["rows"]).permute(0, 2, 1, 3)
            return torch.einsum("bnki,nkio->bno", rows, weight) + embedding @ p["pool.bias"]

        return plain(function, leaves)

    def shortcut(self, leaves: Tensors) -> Network:
        """Without the identity's product."""
        return plain(self.definition, leaves)

    def ours(self, leaves: Tensors) -> Network:
        from hyperfast import HyperLinear

        ins = 2 * self.ins
        layer = HyperLinear(ins, self.out, self.embedding, head_bias=False, layout="io")
        own = fresh({name: leaves[name] for name in ("rows", "embedding")})
        head = joined(leaves["pool.weights"], leaves["pool.bias"])
        own |= adopt(layer, {"head": head}, {"head": "head.weight"})

        def function(x: Tensors) -> Tensor:
            rows = self.neighbours(own).transpose(0, 1)
            return layer(rows, own["embedding"]).transpose(0, 1)

        return Network(function, own, lambda g: g | split("pool", g["head"], ins))


WORKLOADS = (AGCRN("agcrn"),)
