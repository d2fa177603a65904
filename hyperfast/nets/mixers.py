"""Mixers of cooperative agents: what each is worth becomes what all are worth, monotonically."""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast import checks
from hyperfast.activations import named
from hyperfast.functional import hyper_linear
from hyperfast.layout import positive
from hyperfast.nn.gate import is_plain_linear, trunk_and_head
from hyperfast.ops import backends, mixer, mixer_backward
from hyperfast.ops.recorded import gradients, wanted_by_autograd

Layer: TypeAlias = tuple[Tensor, Tensor]  # weight and bias

# The layers of the networks that make W1, W2, V and b1, where all hypernetworks have two.
DEEP = [2, 2, 2, 1]

# pymarl2's names (its hyper_b1 is a Sequential of one), and those of pymarl.
NAMES = {"hyper_w1.": "hyper_w_1.", "hyper_b1.0.": "hyper_b_1."}
NAMES |= {"hyper_w2.": "hyper_w_final.", "hyper_b2.": "V."}


class QMixer(nn.Module):
    """QMIX's monotonic mixing network (Rashid et al. 2018): ``q_tot = |W2(s)| elu(|W1(s)| q +
    b1(s)) + V(s)``, whose weights are made of the state.

    Its state_dict is pymarl's, and torchrl's of one layer; that of pymarl2's ``nmix`` loads too.

    On the CPU, in float32 and float64, a mixer of two-layer hypernetworks is one C++ op, and its
    derivative another. Elsewhere its layers are ops.

    Args:
        n_agents: how many values are mixed.
        state_dim: size of the state; one of several dimensions comes flattened.
        embed_dim: width of the mixing network.
        hypernet_layers: 1 or 2, of the networks that make ``W1`` and ``W2``.
        hypernet_embed: width of these, where they have two.
        device, dtype: of the parameters.

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if positive("hypernet_layers", hypernet_layers) > 2:
            raise ValueError(f"hypernet_layers must be 1 or 2, got {hypernet_layers!r}")
        super().__init__()
        self.n_agents = positive("n_agents", n_agents)
        self.state_dim = positive("state_dim", state_dim)
        self.embed_dim = positive("embed_dim", embed_dim)

        linear = partial(nn.Linear, device=device, dtype=dtype)

        def net(*widths: int) -> nn.Module:
            *first, last = map(linear, (self.state_dim, *widths), widths)
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
        return self._mix(q, s).reshape(*lead, 1)

    def _mix(self, q: Tensor, s: Tensor) -> Tensor:
        """Rows ``(R, 1)`` of ``q (R, n_agents)`` and ``s (R, state_dim)``."""
        nets = [_layers(n) for n in (self.hyper_w_1, self.hyper_w_final, self.V, self.hyper_b_1)]
        if not all(nets):
            w1 = self.hyper_w_1(s).abs().unflatten(1, (self.n_agents, self.embed_dim))
            hidden = torch.bmm(q.unsqueeze(1), w1).squeeze(1) + self.hyper_b_1(s)
            return _mixed(hidden, self.hyper_w_final(s), self.V(s))
        if [*map(len, nets)] == DEEP:
            weights = [t for net in nets for layer in net for t in layer]
            if self._has_its_sizes(nets) and backends.runs_cpu_op([q, s, *weights]):
                if torch.is_grad_enabled():
                    return _Mixer.apply(q, s, *weights)
                return mixer(q, s, weights, False)[0]
        return _fused(q, s, nets)

    def _has_its_sizes(self, nets: list[list[Layer]]) -> bool:
        """Whether the layers of the four networks are as wide as they were made: one may have been
        put into another's place."""
        shapes = [weight.shape for net in nets for weight, _ in net]
        N, S, E, H = self.n_agents, self.state_dim, self.embed_dim, len(nets[0][0][0])
        return shapes == [(H, S), (N * E, H), (H, S), (E, H), (E, S), (1, E), (E, S)]


def _mixed(hidden: Tensor, w2: Tensor, v: Tensor) -> Tensor:
    """Of the pre-activation ``|W1| q + b1``, ``W2`` and ``V``."""
    return (F.elu(hidden) * w2.abs()).sum(1, keepdim=True) + v


def _fused(q: Tensor, s: Tensor, nets: list[list[Layer]]) -> Tensor:
    """The layers that read the state are one product; ``W1``, the largest of what is generated,
    need not be stored."""
    (*before, head), *others = nets
    checks.check_like_weight(head[0], "the mixer", states=s)
    reading = [*before, *(net[0] for net in others)]
    for w, _ in reading:
        if w.shape[1:] != s.shape[1:]:
            raise ValueError(
                f"the mixer's layers must read states of {s.shape[1]} numbers, got a weight of "
                f"shape {checks.shape(w)}"
            )
    weight, bias = map(torch.cat, zip(*reading, strict=True))
    outs = F.linear(s, weight, bias).split([len(w) for w, _ in reading], 1)
    h = outs[0].relu() if before else s
    w2, v, b1 = (
        F.linear(out.relu(), *net[1]) if len(net) == 2 else out
        for out, net in zip(outs[len(before) :], others, strict=True)
    )
    hidden = hyper_linear(q, h, *head, target_bias=False, layout="io", transform="abs") + b1
    return _mixed(hidden, w2, v)


class _Mixer(torch.autograd.Function):
    """The op, whose derivative's own derivative is autograd's of :func:`_fused`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, s: Tensor, *weights: Tensor) -> Tensor:
        y, kept = mixer(q, s, weights, any(ctx.needs_input_grad))
        ctx.save_for_backward(q, s, *weights, kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, s, *weights, kept = ctx.saved_tensors
        if wanted_by_autograd([grad]):
            return tuple(gradients(_by_layers, (q, s, *weights), [grad]))
        of_q, of_s, *some = ctx.needs_input_grad
        mask = of_q, of_s, any(some)
        made = mixer_backward(grad, q, s, weights, kept, mask)
        found = [t if wanted else None for t, wanted in zip(made, mask[:2], strict=False)]
        return *found, *(made[2:] or [None] * len(weights))


def _by_layers(q: Tensor, s: Tensor, *weights: Tensor) -> list[Tensor]:
    layers = iter(zip(weights[::2], weights[1::2], strict=True))
    return [_fused(q, s, [list(islice(layers, n)) for n in DEEP])]


def _layers(net: nn.Module) -> list[Layer]:
    """Weight and bias of the layers of a plain ``Linear`` or ``Linear, ReLU, Linear``, all with
    biases; else none."""
    trunk, head = trunk_and_head(net) or ([], net)
    if trunk and (len(trunk) != 2 or named(trunk[1]) != ("relu", 1.0)):
        return []
    if not is_plain_linear(trunk[0] if trunk else head):  # behind a trunk the head is
        return []
    layers = [(m.weight, m.bias) for m in (*trunk[:1], head)]
    return layers if all(bias is not None for _, bias in layers) else []
