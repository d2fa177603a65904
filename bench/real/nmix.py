"""The mixer of pymarl2 (Hu et al. 2021), QMIX with two-layer hypernetworks, on the map 3s5z."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, linear

from bench.absent import require
from bench.real.real import Draw, Network, Real, Tensors, adopt, plain

# Those that end in a weight, whose sign is dropped, and those that do not.
WEIGHTS = ("hyper_w_1", "hyper_w_final")


@dataclass(frozen=True)
class NMix(Real):
    """Every transition of 128 episodes of 150 steps is a task. The agents' values are a leaf."""

    about: ClassVar = "the mixer of pymarl2 (nmix), 8 agents on 3s5z"
    tasks: ClassVar = "batch"
    tiny: ClassVar = {"batch": 5, "agents": 3, "state": 7, "embed": 4, "hyper": 6}
    corner: ClassVar = "state"

    batch: int = 128 * 150
    agents: int = 8
    state: int = 216
    embed: int = 32
    hyper: int = 64

    def draw(self, draw: Draw) -> tuple[Tensors, Tensors]:
        n, S, E, H = self.agents, self.state, self.embed, self.hyper
        matrices = {
            "hyper_w_1.0": (H, S),
            "hyper_w_1.2": (n * E, H),
            "hyper_w_final.0": (H, S),
            "hyper_w_final.2": (E, H),
            "hyper_b_1": (E, S),
            "V.0": (E, S),
            "V.2": (1, E),
        }
        leaves = {"agent_qs": draw.normal(self.batch, n)}
        for name, (out, ins) in matrices.items():
            leaves[f"{name}.weight"] = draw.linear(out, ins)
            leaves[f"{name}.bias"] = draw.normal(out, std=0.1)
        return leaves, {"state": draw.normal(self.batch, S)}

    def corners(self, t: Tensors) -> Tensor:
        pre = [layer(t, f"{name}.0", t["state"]) for name in (*WEIGHTS, "V")]
        made = [layer(t, f"{name}.2", x.relu()) for name, x in zip(WEIGHTS, pre[:2], strict=True)]
        return torch.cat([*pre, *made], 1).abs().amin(1, keepdim=True)

    @property
    def width(self) -> int:
        return max(self.state, self.hyper, self.embed)

    @property
    def rows(self) -> int:
        return self.batch

    def definition(self, p: Tensors, x: Tensors) -> Tensor:
        first = [layer(p, name, x["state"]) for name in FIRST]
        return self.mix(p, first)

    def mix(self, p: Tensors, first: list[Tensor]) -> Tensor:
        """From what the first layers of the four networks make of the state."""
        of_w_1, of_w_final, b_1, of_v = first
        w_1 = layer(p, "hyper_w_1.2", of_w_1.relu()).abs().view(-1, self.agents, self.embed)
        hidden = elu(torch.bmm(p["agent_qs"].unsqueeze(1), w_1) + b_1.unsqueeze(1))
        w_final = layer(p, "hyper_w_final.2", of_w_final.relu()).abs().unsqueeze(2)
        return torch.bmm(hidden, w_final).squeeze(2) + layer(p, "V.2", of_v.relu())

    def shortcut(self, leaves: Tensors) -> Network:
        return plain(self.merged, leaves)

    def merged(self, p: Tensors, x: Tensors) -> Tensor:
        """All that reads the state in one product."""
        weight = torch.cat([p[f"{name}.weight"] for name in FIRST])
        bias = torch.cat([p[f"{name}.bias"] for name in FIRST])
        sizes = [self.hyper, self.hyper, self.embed, self.embed]
        return self.mix(p, list(linear(x["state"], weight, bias).split(sizes, 1)))

    def package(self, leaves: Tensors) -> Network:
        """TorchRL's mixer has hypernetworks of one layer; two take their places."""
        module = require("torchrl.modules.models.multiagent")
        mixer = module.QMixer((self.state,), self.embed, self.agents, "cpu")
        for name, out in (("hyper_w_1", self.agents * self.embed), ("hyper_w_final", self.embed)):
            layers = nn.Linear(self.state, self.hyper), nn.ReLU(), nn.Linear(self.hyper, out)
            setattr(mixer, name, nn.Sequential(*layers))
        own = self._own(mixer, leaves)
        return Network(lambda x: mixer.mix(own["agent_qs"].unsqueeze(2), x["state"]), own)

    def ours(self, leaves: Tensors) -> Network:
        from hyperfast.nets import QMixer

        mixer = QMixer(self.agents, self.state, self.embed, hypernet_embed=self.hyper)
        own = self._own(mixer, leaves)
        return Network(lambda x: mixer(own["agent_qs"], x["state"]), own)

    @staticmethod
    def _own(mixer: nn.Module, leaves: Tensors) -> Tensors:
        """The values of agents, and the mixer's parameters."""
        own = {"agent_qs": leaves["agent_qs"].clone().requires_grad_()}
        return own | adopt(mixer, {name: leaf for name, leaf in leaves.items() if name not in own})


FIRST = ("hyper_w_1.0", "hyper_w_final.0", "hyper_b_1", "V.0")


def layer(p: Tensors, name: str, x: Tensor) -> Tensor:
    return linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


WORKLOADS = (NMix("nmix_3s5z"),)
