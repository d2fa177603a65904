"""Mixers of cooperative agents: what each is worth becomes what all are worth, monotonically."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast import checks
from hyperfast.functional import hyper_linear
from hyperfast.layout import positive
from hyperfast.nn.gate import is_plain_linear, trunk_and_head

# pymarl2's names (its hyper_b1 is a Sequential of one), and those of pymarl.
NAMES = {"hyper_w1.": "hyper_w_1.", "hyper_b1.0.": "hyper_b_1."}
NAMES |= {"hyper_w2.": "hyper_w_final.", "hyper_b2.": "V."}


class QMixer(nn.Module):
    """QMIX's monotonic mixing network (Rashid et al. 2018): ``q_tot = |W2(s)| elu(|W1(s)| q +
    b1(s)) + V(s)``, whose weights are made of the state.

    Its state_dict is pymarl's, and torchrl's of one layer; that of pymarl2's ``nmix`` loads too.

    Args:
        n_agents: how many values are mixed.
        state_dim: size of the state; one of several dimensions comes flattened.
        embed_dim: width of the mixing network.
        hypernet_layers: 1 or 2, of the networks that make ``W1`` and ``W2``.
        hypernet_embed: width of these, where they have two.

    Raises:
        TypeError: a size that is not an int.
        ValueError: a size below one, another number of layers.

    Example:
        >>> mixer = hyperfast.nets.QMixer(n_agents=8, state_dim=216)
        >>> mixer(torch.randn(128, 150, 8), torch.randn(128, 150, 216)).shape
        torch.Size([128, 150, 1])
    """

    def __init__(
        self,
        n_agents: int,
        state_dim: int,
        embed_dim: int = 32,
        *,
        hypernet_layers: int = 2,
        hypernet_embed: int = 64,
    ):
        if hypernet_layers not in (1, 2):
            raise ValueError(f"hypernet_layers must be 1 or 2, got {hypernet_layers!r}")
        super().__init__()
        self.n_agents = positive("n_agents", n_agents)
        self.state_dim = positive("state_dim", state_dim)
        self.embed_dim = positive("embed_dim", embed_dim)

        def net(*widths: int) -> nn.Module:
            *first, last = map(nn.Linear, (self.state_dim, *widths), widths)
            return nn.Sequential(*first, nn.ReLU(), last) if first else last

        through = [positive("hypernet_embed", hypernet_embed)] * (hypernet_layers - 1)
        self.hyper_w_1 = net(*through, self.n_agents * self.embed_dim)
        self.hyper_w_final = net(*through, self.embed_dim)
        self.hyper_b_1 = net(self.embed_dim)
        self.V = net(self.embed_dim, 1)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for theirs, ours in NAMES.items():
            for key in [key for key in state_dict if key.startswith(prefix + theirs)]:
                state_dict[prefix + ours + key[len(prefix + theirs) :]] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, agent_qs: Tensor, states: Tensor) -> Tensor:
        """``(..., 1)`` of ``agent_qs (..., n_agents)``, as ``(batch, T, n_agents)``, and of
        ``states (..., state_dim)``; raises ValueError or TypeError where these disagree."""
        checks.check_operands(agent_qs=agent_qs, states=states)
        *lead, agents = agent_qs.shape or (0,)
        if agents != self.n_agents or states.shape != (*lead, self.state_dim):
            raise ValueError(
                f"agent_qs and states must have shapes (..., {self.n_agents}) and (..., "
                f"{self.state_dim}), got {checks.shape(agent_qs)} and {checks.shape(states)}"
            )
        q, s = agent_qs.reshape(-1, self.n_agents), states.reshape(-1, self.state_dim)
        nets = [_layers(n) for n in (self.hyper_w_1, self.hyper_w_final, self.V, self.hyper_b_1)]
        if all(nets):
            hidden, w2, v = _fused(q, s, nets)
        else:
            w1 = self.hyper_w_1(s).abs().unflatten(1, (self.n_agents, self.embed_dim))
            hidden = torch.bmm(q.unsqueeze(1), w1).squeeze(1) + self.hyper_b_1(s)
            w2, v = self.hyper_w_final(s), self.V(s)
        return ((F.elu(hidden) * w2.abs()).sum(1, keepdim=True) + v).reshape(*lead, 1)


def _fused(q: Tensor, s: Tensor, nets: list[list[Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """The pre-activation ``|W1| q + b1``, ``W2`` and ``V``. The layers that read the state are one
    product; ``W1``, the largest of what is generated, need not be stored."""
    (*before, head), *others = nets
    checks.check_same_kind(**{"states": s, "the mixer's weight": head.weight})
    reading = [*before, *(net[0] for net in others)]
    weight, bias = (torch.cat([getattr(m, name) for m in reading]) for name in ("weight", "bias"))
    outs = F.linear(s, weight, bias).split([m.out_features for m in reading], 1)
    h = outs[0].relu() if before else s
    w2, v, b1 = (
        net[1](out.relu()) if len(net) == 2 else out
        for out, net in zip(outs[len(before) :], others, strict=True)
    )
    made = q, h, head.weight, head.bias
    return hyper_linear(*made, target_bias=False, layout="io", transform="abs") + b1, w2, v


def _layers(net: nn.Module) -> list[Any]:
    """The layers of a plain ``Linear`` or ``Linear, ReLU, Linear``, all with biases; else none."""
    trunk, head = trunk_and_head(net) or ([], net)
    if checks.is_hooked(*trunk) or [*map(type, trunk)] not in ([], [nn.Linear, nn.ReLU]):
        return []
    layers = [*trunk[:1], head]
    return layers if all(is_plain_linear(m) and m.bias is not None for m in layers) else []
