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

# pymarl2's names (its hyper_b1 is a Sequential of one), and ours, which are pymarl's and torchrl's.
NAMES = {
    "hyper_w1.": "hyper_w_1.",
    "hyper_b1.0.": "hyper_b_1.",
    "hyper_w2.": "hyper_w_final.",
    "hyper_b2.": "V.",
}


class QMixer(nn.Module):
    """QMIX's monotonic mixing network (Rashid et al. 2018): ``q_tot = |W2(s)| elu(|W1(s)| q +
    b1(s)) + V(s)``, whose weights are made of the state.

    Its state_dict is pymarl's and torchrl's (there ``hypernet_layers=1``); that of pymarl2's
    ``nmix`` loads as well.

    Args:
        n_agents: how many values are mixed.
        state_dim: size of the state; a state of several dimensions is flattened before.
        embed_dim: width of the mixing network.
        hypernet_layers: of the networks that make ``W1`` and ``W2``, 1 or 2.
        hypernet_embed: their width, where they have two layers.
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
        if hypernet_layers not in (1, 2):
            raise ValueError(f"hypernet_layers must be 1 or 2, got {hypernet_layers!r}")
        super().__init__()
        self.n_agents = positive("n_agents", n_agents)
        self.state_dim = positive("state_dim", state_dim)
        self.embed_dim = positive("embed_dim", embed_dim)
        positive("hypernet_embed", hypernet_embed)

        def net(*widths: int) -> nn.Module:
            *first, last = (
                nn.Linear(i, o, device=device, dtype=dtype)
                for i, o in zip((self.state_dim, *widths), widths, strict=False)
            )
            return nn.Sequential(*first, nn.ReLU(), last) if first else last

        through = [hypernet_embed] * (hypernet_layers - 1)
        self.hyper_w_1 = net(*through, self.n_agents * self.embed_dim)
        self.hyper_w_final = net(*through, self.embed_dim)
        self.hyper_b_1 = net(self.embed_dim)
        self.V = net(self.embed_dim, 1)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in [key for key in state_dict if key.startswith(prefix)]:
            for theirs, ours in NAMES.items():
                if name.startswith(prefix + theirs):
                    moved = prefix + ours + name[len(prefix + theirs) :]
                    state_dict[moved] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, agent_qs: Tensor, states: Tensor) -> Tensor:
        """Mixes the values of agents.

        Args:
            agent_qs: ``(..., n_agents)``: ``(batch, T, n_agents)``, or flat.
            states: ``(..., state_dim)``, with the same leading dimensions.

        Returns:
            ``(..., 1)``.

        Raises:
            ValueError: shapes or devices that disagree.
            TypeError: dtypes that disagree.
        """
        ...
