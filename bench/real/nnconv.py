"""Edge-conditioned convolution (Gilmer et al. 2017): a network of the edge's features makes the
matrix of that edge. Sizes of PyTorch Geometric's example on QM9."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bench.absent import require
from bench.real.real import Draw, Network, Real, Tensors, adopt, plain


@dataclass(frozen=True)
class NNConv(Real):
    """Complete graphs, or in-degrees of 1 to `most` at random. x is a leaf, for the layer comes
    three times in a row; the example has no root weight."""

    about: ClassVar = "NNConv, mean over the edges of QM9's molecules"
    tasks: ClassVar = "graphs"
    tiny: ClassVar = {"graphs": 2, "nodes": 4, "channels": 5, "hidden": 6}
    corner: ClassVar = "edge_attr"

    graphs: int = 64
    nodes: int = 18
    channels: int = 73
    features: int = 5
    hidden: int = 128
    most: int = 0

    def draw(self, draw: Draw) -> tuple[Tensors, Tensors]:
        nodes, C = self.graphs * self.nodes, self.channels
        if self.most:
            ends = range(nodes)
            pairs = [
                (draw.integers.randrange(nodes), end)
                for end in ends
                for _ in range(draw.integers.randint(1, self.most))
            ]
            draw.integers.shuffle(pairs)
        else:
            own = range(self.nodes)
            pairs = [
                (graph * self.nodes + i, graph * self.nodes + j)
                for graph in range(self.graphs)
                for i in own
                for j in own
                if i != j
            ]
        leaves = {
            "x": draw.normal(nodes, C),
            "nn.0.weight": draw.linear(self.hidden, self.features),
            "nn.0.bias": draw.normal(self.hidden, std=0.1),
            "nn.2.weight": draw.normal(C * C, self.hidden, std=(self.hidden * C) ** -0.5),
            "nn.2.bias": draw.normal(C * C, std=C**-0.5),
            "bias": draw.normal(C, std=0.1),
        }
        inputs = {
            "edge_index": torch.tensor(pairs).T.contiguous(),
            "edge_attr": draw.normal(len(pairs), self.features),
        }
        return leaves, inputs

    def corners(self, t: Tensors) -> Tensor:
        pre = linear(t["edge_attr"], t["nn.0.weight"], t["nn.0.bias"])
        return pre.abs().amin(1, keepdim=True)

    @property
    def width(self) -> int:
        return max(self.hidden, self.channels, self.most, self.nodes)

    @property
    def rows(self) -> int:
        return self.graphs * self.nodes * max(self.nodes - 1, (self.most + 1) // 2)

    def definition(self, p: Tensors, x: Tensors) -> Tensor:
        source, end = x["edge_index"]
        weight = linear(edge_features(p, x), p["nn.2.weight"], p["nn.2.bias"])
        weight = weight.view(-1, self.channels, self.channels)
        message = torch.matmul(p["x"][source].unsqueeze(1), weight).squeeze(1)
        total = torch.zeros_like(p["x"]).index_add(0, end, message)
        return total / degrees(p["x"], end)[:, None] + p["bias"]

    def shortcut(self, leaves: Tensors) -> Network:
        return plain(self.sum_first, leaves)

    def sum_first(self, p: Tensors, x: Tensors) -> Tensor:
        """The head is linear: outer products of x and features are summed over a node's edges, and
        one product with the head is left. Edges are sorted by node and padded to the most edges."""
        source, end = x["edge_index"]
        C, degree = self.channels, degrees(p["x"], end)
        order = end.argsort(stable=True)
        counts = degree.long()
        place = torch.arange(len(end)) - (counts.cumsum(0) - counts)[end[order]]
        most = self.most or self.nodes - 1
        table = torch.full((len(degree), most), len(end))
        table[end[order], place] = order
        pad = partial(nn.functional.pad, pad=(0, 0, 0, 1))
        h = torch.cat([edge_features(p, x), x["edge_attr"].new_ones(len(end), 1)], 1)
        head = torch.cat([p["nn.2.weight"], p["nn.2.bias"][:, None]], 1)
        outer = torch.bmm(pad(p["x"][source])[table].mT, pad(h)[table])  # (nodes, in, features + 1)
        head = head.view(C, C, -1).transpose(1, 2).reshape(-1, C)  # (in * features, out)
        return torch.mm(outer.flatten(1), head) / degree[:, None] + p["bias"]

    def package(self, leaves: Tensors) -> Network:
        return self._of(require("torch_geometric.nn").NNConv, leaves)

    def ours(self, leaves: Tensors) -> Network:
        from hyperfast.nets import NNConv

        return self._of(NNConv, leaves)

    def _of(self, layer: Any, leaves: Tensors) -> Network:
        """Both have the same face, and the same names of parameters."""
        C = self.channels
        edge_net = nn.Sequential(
            nn.Linear(self.features, self.hidden), nn.ReLU(), nn.Linear(self.hidden, C * C)
        )
        conv = layer(C, C, edge_net, aggr="mean", root_weight=False)
        own = {"x": leaves["x"].clone().requires_grad_()}
        own |= adopt(conv, {name: leaf for name, leaf in leaves.items() if name != "x"})
        return Network(lambda x: conv(own["x"], x["edge_index"], x["edge_attr"]), own)


def edge_features(p: Tensors, x: Tensors) -> Tensor:
    return torch.relu(linear(x["edge_attr"], p["nn.0.weight"], p["nn.0.bias"]))


def degrees(nodes: Tensor, end: Tensor) -> Tensor:
    """Of every node, at least 1."""
    ones = nodes.new_ones(len(end))
    return nodes.new_zeros(len(nodes)).index_add(0, end, ones).clamp(min=1)


WORKLOADS = NNConv("nnconv_qm9"), NNConv("nnconv_ragged", most=40)
