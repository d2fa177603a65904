"""Graph convolutions whose edges have weights of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter, init

from hyperfast import checks
from hyperfast.functional import Destinations, destinations, generated_linear, task_linear
from hyperfast.layout import Generated, boolean, positive
from hyperfast.nn.gate import is_plain_linear, trunk_and_head

AGGREGATIONS = {"add": "sum", "sum": "sum", "mean": "mean"}


class NNConv(Module):
    """The edge-conditioned convolution (Simonovsky, Komodakis 2017; Gilmer et al. 2017): ``y_i =
    lin(x_i) + sum over edges j -> i of x_j nn(e_ji) + bias``, PyTorch Geometric's, with its names.

    Where ``nn`` is an ``nn.Sequential`` that ends in an ``nn.Linear``, the matrices of edges are
    not stored, and not even formed if that is less work: features of edges, times those of nodes,
    are added up by destination before they meet the last layer.

    Args:
        in_channels: features of a node, or a pair: of a source and of a destination.
        out_channels: features that come out.
        nn: a module that makes a matrix ``(in, out)`` of every edge, ``(E, D) -> (E, in * out)``.
        aggr: ``"add"`` or ``"sum"``; or ``"mean"``, which is 0 for a node without edges.
        root_weight: whether a node's own features, times ``lin.weight``, are added.
        bias: whether there is one.
        device, dtype: of ``lin`` and of the bias.

    Raises:
        ValueError: a size below one, an unknown aggregation.
        TypeError: a size that is not an int, an option that is not a bool, an ``nn`` that cannot be
            called.

    Example:
        >>> edges = hyperfast.HyperNet(5, 7, (), 4, bias=False).generator  # trunk and head
        >>> conv = hyperfast.nets.NNConv(7, 4, edges, aggr="mean")
        >>> conv(torch.randn(10, 7), torch.randint(10, (2, 30)), torch.randn(30, 5)).shape
        torch.Size([10, 4])
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        nn: Module,
        aggr: str = "add",
        root_weight: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if aggr not in [*AGGREGATIONS]:
            raise ValueError(f"aggr must be one of {list(AGGREGATIONS)}, got {aggr!r}")
        if not callable(nn):
            raise TypeError(f"nn must be a module, got {type(nn).__name__}")
        pair = in_channels if isinstance(in_channels, tuple) else (in_channels, in_channels)
        if len(pair) != 2:
            raise ValueError(f"in_channels must be an int or a pair of them, got {in_channels}")
        ins, own = (positive("in_channels", n) for n in pair)
        out = positive("out_channels", out_channels)
        super().__init__()
        self.in_channels, self.own_channels, self.out_channels = ins, own, out
        self.nn, self.aggr = nn, aggr
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        has_root, has_bias = boolean("root_weight", root_weight), boolean("bias", bias)
        self.lin = Linear(own, out, bias=False, **kind) if has_root else None
        self.bias = Parameter(torch.zeros(out, **kind)) if has_bias else None

    def reset_parameters(self) -> None:
        """Initialises all layers anew, those of ``nn`` too; the bias is zero."""
        for module in [*self.modules()][1:]:
            getattr(module, "reset_parameters", lambda: None)()
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Any, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        """Nodes' ``(V, out)`` of their features.

        Args:
            x: ``(V, in)``, or a pair: of sources and of destinations, or None, as many as sources.
            edge_index: ``(2, E)`` int64: source and destination of every edge, in any order.
            edge_attr: ``(E, D)``, what ``nn`` takes.

        Raises:
            ValueError: shapes or devices that disagree, an ``nn`` that returns another width.
            TypeError: dtypes that disagree, an ``edge_index`` that is not int64.
            IndexError: a node that is not there.
        """
        pair = x if isinstance(x, list | tuple) else (x, x)
        if len(pair) != 2:
            raise ValueError(f"x must be a Tensor or a pair of them, got {len(pair)} of them")
        source, own = pair
        nodes = (source, self.in_channels), (source if own is None else own, self.own_channels)
        weight = getattr(self.lin, "weight", None)
        for t, width in nodes[: 1 if own is None else 2]:
            if isinstance(weight, Tensor):
                checks.check_like_weight(weight, "the layer", x=t)
            if checks.check_tensor("x", t).ndim != 2 or t.shape[1] != width:
                raise ValueError(f"x must have shape (V, {width}), got {checks.shape(t)}")
        if checks.check_tensor("edge_index", edge_index).ndim != 2 or len(edge_index) != 2:
            raise ValueError(f"edge_index must have shape (2, E), got {checks.shape(edge_index)}")
        checks.check_dense(edge_attr=checks.check_tensor("edge_attr", edge_attr))
        if edge_attr.shape[:1] != (edges := edge_index.shape[1:]):
            wanted = f"must have {edges[0]} rows, one an edge"
            raise ValueError(f"edge_attr {wanted}, got shape {checks.shape(edge_attr)}")
        given = edge_index[1], nodes[1][0].shape[0], AGGREGATIONS[self.aggr], source, edges
        by = destinations(*given, "edge_index[1]")
        checks.check_in_range_if_known(edge_index[0], source.shape[0], "edge_index[0]")
        y = self._convolve(source.index_select(0, edge_index[0]), edge_attr, by)
        if self.lin is not None and own is not None:
            y = y + self.lin(own)
        return y if self.bias is None else y + self.bias

    def _convolve(self, x: Tensor, h: Tensor, by: Destinations) -> Tensor:
        """``x (E, in)`` of sources, times the matrices of edges, added up."""
        trunk, head = trunk_and_head(self.nn) or ([], self.nn)
        if is_plain_linear(first := trunk[0] if trunk else head):
            checks.check_like_weight(first.weight, "nn", edge_attr=h)
            if h.shape[-1] != first.in_features:
                wanted = f"(E, {first.in_features}), as nn reads it"
                raise ValueError(f"edge_attr must have shape {wanted}, got {checks.shape(h)}")
        for module in trunk:
            h = module(h)
        E, numel = x.shape[0], self.in_channels * self.out_channels
        if is_plain_linear(head) and (*h.shape, head.out_features) == (E, head.in_features, numel):
            given = {"nn's weight": head.weight, "x": x, "what nn's trunk returns": h}
            w, x, h, b = checks.check_and_cast(**given, bias=head.bias)
            made = Generated.of_head(w, b, self.in_channels, False, "io")
            return generated_linear(x, h, made, by=by)
        weight = head(h)
        if weight.shape[:1] != x.shape[:1] or weight.shape[1:].numel() != numel:
            wanted = f"{(E, numel)}, in_channels * out_channels numbers an edge"
            raise ValueError(f"nn must return shape {wanted}, got {checks.shape(weight)}")
        weight = weight.reshape(E, self.in_channels, self.out_channels)
        return by.reduce(task_linear(x, weight.mT))
