"""Graph convolutions whose edges have weights of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter, init

from hyperfast import checks
from hyperfast.functional import Destinations, generated_linear, task_linear
from hyperfast.layout import Generated, positive
from hyperfast.nn.gate import trunk_and_head

AGGREGATIONS = ("add", "sum", "mean")


class NNConv(Module):
    """The edge-conditioned convolution (Simonovsky, Komodakis 2017; Gilmer et al. 2017): ``y_i =
    lin(x_i) + sum over edges j -> i of x_j nn(e_ji) + bias``, as PyTorch Geometric has it, with its
    names of parameters.

    Where ``nn`` is an ``nn.Sequential`` that ends in an ``nn.Linear``, no edge's matrix is ever
    formed if that is less work: features of edges times those of nodes are added up by destination
    before they meet the last layer.

    Args:
        in_channels: features of a node, or a pair: of a source and of a destination.
        out_channels: features that come out.
        nn: a module that makes a matrix ``(in, out)`` of every edge, ``(E, D) -> (E, in * out)``.
            It stays as it is; ``reset_parameters()`` initialises it too.
        aggr: ``"add"`` or ``"sum"``; or ``"mean"``, which is 0 for a node without edges.
        root_weight: whether a node's own features, times ``lin.weight``, are added.
        bias: whether there is one.
        device, dtype: of the parameters, but those of ``nn``.

    Raises:
        ValueError: a size below one, an unknown aggregation.
        TypeError: a size that is not an int.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.ReLU(), torch.nn.Linear(16, 32))
        >>> conv = hyperfast.nets.NNConv(8, 4, net, aggr="mean")
        >>> conv(torch.randn(10, 8), torch.randint(10, (2, 30)), torch.randn(30, 5)).shape
        torch.Size([10, 4])
    """  # noqa: E501

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        nn: Module,
        aggr: str = "add",
        root_weight: bool = True,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if aggr not in AGGREGATIONS:
            raise ValueError(f"aggr must be one of {list(AGGREGATIONS)}, got {aggr!r}")
        pair = in_channels if isinstance(in_channels, tuple) else (in_channels, in_channels)
        ins, root = (positive("in_channels", n) for n in pair)
        super().__init__()
        self.in_channels, self.out_channels = ins, positive("out_channels", out_channels)
        self.nn, self.aggr = nn, aggr
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lin = Linear(root, self.out_channels, bias=False, **kind) if root_weight else None
        self.bias = Parameter(torch.zeros(self.out_channels, **kind)) if bias else None

    def reset_parameters(self) -> None:
        """Initialises all layers anew, those of ``nn`` too; the bias is zero."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(
        self, x: Tensor | tuple[Tensor, Tensor], edge_index: Tensor, edge_attr: Tensor
    ) -> Tensor:
        """Convolves features of nodes.

        Args:
            x: ``(V, in)``, or a pair of those of sources and of destinations.
            edge_index: ``(2, E)`` int64: source and destination of every edge, in any order.
            edge_attr: ``(E, D)``, what ``nn`` takes.

        Returns:
            ``(V, out)``, of the destinations.

        Raises:
            ValueError: shapes or devices that disagree, an ``nn`` that returns another width.
            TypeError: dtypes that disagree, an ``edge_index`` that is not int64.
            IndexError: a node that is not there.
        """
        sources, own = (x, x) if isinstance(x, Tensor) else x
        wanted = self.in_channels, self.in_channels if self.lin is None else self.lin.in_features
        for t, width in zip((sources, own), wanted, strict=True):
            if checks.check_tensor("x", t).ndim != 2 or t.shape[1] != width:
                raise ValueError(f"x must have shape (V, {width}), got {checks.shape(t)}")
        by = self._edges(edge_index, edge_attr, sources, own)
        y = self._convolve(sources.index_select(0, edge_index[0]), edge_attr, by)
        if self.lin is not None:
            y = y + self.lin(own)
        return y if self.bias is None else y + self.bias

    def _edges(
        self, edge_index: Tensor, edge_attr: Tensor, sources: Tensor, own: Tensor
    ) -> Destinations:
        if checks.check_tensor("edge_index", edge_index).dtype != torch.int64:
            raise TypeError(f"edge_index must have dtype torch.int64, got {edge_index.dtype}")
        edges = checks.check_tensor("edge_attr", edge_attr).shape[:1]
        if edge_index.shape != (2, *edges):
            raise ValueError(
                f"edge_index must have shape {(2, *edges)}, a column an edge of edge_attr, "
                f"got {checks.shape(edge_index)}"
            )
        for t, nodes in zip(edge_index, (sources, own), strict=True):
            if t.device != nodes.device:
                raise ValueError(
                    f"edge_index must be on the device of x, {nodes.device}, got {t.device}"
                )
            if not torch.compiler.is_compiling():
                checks.check_in_range(t, len(nodes), "edge_index")
        return Destinations(edge_index[1], len(own), self.aggr == "mean")

    def _convolve(self, x: Tensor, edge_attr: Tensor, by: Destinations) -> Tensor:
        """``x (E, in)`` of sources, times the matrices of edges, added up."""
        edges, ins, out = len(x), self.in_channels, self.out_channels
        parts = trunk_and_head(self.nn)
        if parts is None:
            weight = _of_edges(self.nn(edge_attr), edges, ins * out)
            return by.reduce(task_linear(x, weight.view(edges, ins, out).mT))
        trunk, head = parts
        h = edge_attr
        for module in trunk:
            h = module(h)
        h = _of_edges(h, edges, head.in_features)
        x, h, weight, bias = checks.check_and_cast(x=x, h=h, weight=head.weight, bias=head.bias)
        made = Generated.of_head(weight, bias, ins, False, "io")
        return generated_linear(x, h, made, by=by)
