"""Rows of many users in one batch, each with a low-rank adapter of its own (Hu et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bench.absent import require
from bench.real.real import Draw, Network, Real, Tensors, adopt, fresh, plain


@dataclass(frozen=True)
class LoRA(Real):
    """The base is frozen; the rows are a leaf, for layers below have adapters too."""

    about: ClassVar = "64 LoRA adapters of rank 8 in one batch of 512 rows"
    tasks: ClassVar = "adapters"
    tiny: ClassVar = {"adapters": 3, "batch": 10, "ins": 5, "out": 6, "rank": 2}
    loops: ClassVar = True

    adapters: int = 64
    batch: int = 512
    ins: int = 512
    out: int = 512
    rank: int = 8
    alpha: int = 16

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def draw(self, draw: Draw) -> tuple[Tensors, Tensors]:
        leaves = {
            "rows": draw.normal(self.batch, self.ins),
            "A": draw.normal(self.adapters, self.rank, self.ins, std=self.ins**-0.5),
            "B": draw.normal(self.adapters, self.out, self.rank, std=self.rank**-0.5),
        }
        each = -(-self.batch // self.adapters)
        ids = (list(range(self.adapters)) * each)[: self.batch]
        draw.integers.shuffle(ids)
        return leaves, {
            "weight": draw.linear(self.out, self.ins),
            "bias": draw.normal(self.out, std=0.1),
            "ids": torch.tensor(ids),
        }

    @property
    def width(self) -> int:
        return max(self.ins, self.rank)

    @property
    def rows(self) -> int:
        return max(self.batch, self.out)

    def definition(self, p: Tensors, x: Tensors) -> Tensor:
        low = torch.bmm(p["A"][x["ids"]], p["rows"].unsqueeze(2))
        high = torch.bmm(p["B"][x["ids"]], low).squeeze(2)
        return linear(p["rows"], x["weight"], x["bias"]) + self.scaling * high

    def formula(self, leaves: Tensors) -> Network:
        """Adapter after adapter."""
        own, back = self.one_by_one(leaves)

        def function(x: Tensors) -> Tensor:
            y = linear(own["rows"], x["weight"], x["bias"])
            for task in range(self.adapters):
                some = (x["ids"] == task).nonzero().squeeze(1)
                low = linear(own["rows"][some], own[f"{task}.A"])
                y[some] += self.scaling * linear(low, own[f"{task}.B"])
            return y

        return Network(function, own, back)

    def shortcut(self, leaves: Tensors) -> Network:
        """bmm of gathered copies."""
        return plain(self.definition, leaves)

    def package(self, leaves: Tensors) -> Network:
        layer_type = require("peft.tuners.lora.layer").Linear
        config = require("peft").LoraConfig(r=self.rank, lora_alpha=self.alpha)
        base = nn.Linear(self.ins, self.out).requires_grad_(False)
        names = [f"{task}" for task in range(self.adapters)]
        layer = layer_type(base, names[0], config, r=self.rank, lora_alpha=self.alpha)
        for name in names[1:]:
            layer.update_layer(name, self.rank, self.alpha, config=config)
        own, back = self.one_by_one(leaves)
        for name in names:
            layer.lora_A[name].weight = nn.Parameter(own[f"{name}.A"].detach())
            layer.lora_B[name].weight = nn.Parameter(own[f"{name}.B"].detach())
            own |= {f"{name}.A": layer.lora_A[name].weight, f"{name}.B": layer.lora_B[name].weight}
        layer.eval()

        def function(x: Tensors) -> Tensor:
            base.weight.data, base.bias.data = x["weight"], x["bias"]
            return layer(own["rows"], adapter_names=[f"{task}" for task in x["ids"].tolist()])

        return Network(function, own, back)

    def one_by_one(self, leaves: Tensors) -> tuple[Tensors, Callable[[Tensors], Tensors]]:
        """Parameters of every adapter for itself, and the way back."""
        own = fresh({"rows": leaves["rows"]})
        for name in "AB":
            own |= fresh({f"{task}.{name}": leaf for task, leaf in enumerate(leaves[name])})

        def back(g: Tensors) -> Tensors:
            every = range(self.adapters)
            return g | {n: torch.stack([g[f"{task}.{n}"] for task in every]) for n in "AB"}

        return own, back

    def ours(self, leaves: Tensors) -> Network:
        """The scale is part of B, once and for all."""
        from hyperfast import TaskLinear

        base = nn.Linear(self.ins, self.out).requires_grad_(False)
        layer = TaskLinear(self.adapters, self.ins, self.out, bias=False, rank=self.rank, base=base)
        scaled = leaves | {"B": leaves["B"] * self.scaling}
        own = fresh({"rows": leaves["rows"]})
        own |= adopt(layer, scaled, {"A": "weight_a", "B": "weight_b"})

        def function(x: Tensors) -> Tensor:
            base.weight.data, base.bias.data = x["weight"], x["bias"]
            return layer(own["rows"], task_ids=x["ids"])

        return Network(function, own, lambda g: g | {"B": g["B"] * self.scaling})


WORKLOADS = (LoRA("lora"),)
