"""A HyperLSTM (Ha, Dai, Le 2016): an LSTM whose weights a smaller LSTM rescales at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from bench.real.real import Draw, Network, Real, Tensors, adopt

GATES = "ifgo"
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class HyperLSTM(Real):
    """The input is a leaf, for an embedding made it. The formula is that of tutorials: a linear
    layer for each gate and part, step after step."""

    about: ClassVar = "a HyperLSTM on sequences of 100"
    tasks: ClassVar = "batch"
    # Units enough: normalised over 5 or 6, rows of nearly equal ones are divided by what rounding
    # left of their differences, and which of two right answers errs less is chance.
    tiny: ClassVar = {"steps": 2, "batch": 3, "ins": 4, "hidden": 24, "hyper": 16, "n_z": 4}
    loops: ClassVar = True

    steps: int = 100
    batch: int = 128
    ins: int = 128
    hidden: int = 256
    hyper: int = 64
    n_z: int = 16

    def draw(self, draw: Draw) -> tuple[Tensors, Tensors]:
        H, E, n = self.hidden, self.hyper, self.n_z
        leaves = {
            "input": draw.normal(self.steps, self.batch, self.ins),
            "hyper.hidden.weight": draw.linear(4 * E, E),
            "hyper.hidden.bias": draw.normal(4 * E, std=0.1),
            "hyper.input.weight": draw.linear(4 * E, H + self.ins),
        }
        for kind in "hxb":
            leaves[f"z_{kind}.weight"] = draw.linear(4 * n, E)
            if kind != "b":
                leaves[f"z_{kind}.bias"] = 1 + draw.normal(4 * n, std=0.1)
            leaves |= {f"d_{kind}.{y}.weight": draw.linear(H, n) for y in GATES}
        for y in GATES:
            leaves[f"w_h.{y}"] = draw.linear(H, H)
            leaves[f"w_x.{y}"] = draw.linear(H, self.ins)
            leaves[f"d_b.{y}.bias"] = draw.normal(H, std=0.1)
        for name, width in (("norm", H), ("hyper.norm", E)):
            for y in (*GATES, "c"):
                leaves[f"{name}.{y}.weight"] = 1 + draw.normal(width, std=0.1)
                leaves[f"{name}.{y}.bias"] = draw.normal(width, std=0.1)
        return leaves, {}

    @property
    def width(self) -> int:
        return self.hidden + self.ins

    @property
    def rows(self) -> int:
        return self.steps * self.batch

    def cell(self, p: Tensors, x: Tensor, main: Pair, hyper: Pair) -> tuple[Pair, Pair]:
        """A step: the states ``(h, c)`` of the main and of the hyper LSTM."""
        h = main[0]
        pre = linear(hyper[0], p["hyper.hidden.weight"], p["hyper.hidden.bias"])
        pre = pre + linear(torch.cat([h, x], -1), p["hyper.input.weight"])
        hyper = lstm(p, "hyper.norm", list(pre.chunk(4, -1)), hyper[1])
        z = [
            linear(hyper[0], p[f"z_{kind}.weight"], p.get(f"z_{kind}.bias")).chunk(4, -1)
            for kind in "hxb"
        ]
        gates = []
        for y, z_h, z_x, z_b in zip(GATES, *z, strict=True):
            d_h, d_x = linear(z_h, p[f"d_h.{y}.weight"]), linear(z_x, p[f"d_x.{y}.weight"])
            bias = linear(z_b, p[f"d_b.{y}.weight"], p[f"d_b.{y}.bias"])
            gates.append(d_h * linear(h, p[f"w_h.{y}"]) + d_x * linear(x, p[f"w_x.{y}"]) + bias)
        return lstm(p, "norm", gates, main[1]), hyper

    def definition(self, p: Tensors, x: Tensors) -> Tensor:
        zeros = p["input"].new_zeros
        main = (zeros(self.batch, self.hidden),) * 2
        hyper = (zeros(self.batch, self.hyper),) * 2
        outputs = []
        for row in p["input"]:
            main, hyper = self.cell(p, row, main, hyper)
            outputs.append(main[0])
        return torch.stack(outputs)

    def ours(self, leaves: Tensors) -> Network:
        from hyperfast import nets

        model = nets.HyperLSTM(self.ins, self.hidden, hyper_size=self.hyper, n_z=self.n_z)
        own = {"input": leaves["input"].clone().requires_grad_()}
        own |= adopt(model.layers[0], self.joined(leaves))
        return Network(lambda _: model(own["input"])[0], own, self.split)

    def joined(self, p: Tensors) -> Tensors:
        """As hyperfast's cell lays them out."""
        of_h, of_x = p["hyper.input.weight"].split([self.hidden, self.ins], 1)
        own = {
            "weight_ih": torch.cat([*(p[f"w_x.{y}"] for y in GATES), of_x]),
            "weight_hh": torch.cat([*(p[f"w_h.{y}"] for y in GATES), of_h]),
            "hyper_weight_hh": p["hyper.hidden.weight"],
            "hyper_bias": p["hyper.hidden.bias"],
            "weight_z": torch.cat([p[f"z_{kind}.weight"] for kind in "hxb"]),
            "bias_z": torch.cat([p[f"z_{kind}.bias"] for kind in "hx"]),
            "weight_d": torch.stack([p[f"d_{kind}.{y}.weight"] for kind in "hxb" for y in GATES]),
            "bias": torch.cat([p[f"d_b.{y}.bias"] for y in GATES]),
        }
        for part in ("weight", "bias"):
            for name in ("norm", "hyper.norm"):
                rows = [p[f"{name}.{y}.{part}"] for y in (*GATES, "c")]
                own[f"{name.replace('.', '_')}_{part}"] = torch.stack(rows)
        return own

    def split(self, g: Tensors) -> Tensors:
        """The inverse of :meth:`joined`."""
        found = {"input": g["input"]}
        inputs = g["weight_ih"], g["weight_hh"]
        (*w_x, of_x), (*w_h, of_h) = (w.split([self.hidden] * 4 + [4 * self.hyper]) for w in inputs)
        found["hyper.input.weight"] = torch.cat([of_h, of_x], 1)
        found["hyper.hidden.weight"] = g["hyper_weight_hh"]
        found["hyper.hidden.bias"] = g["hyper_bias"]
        found |= {f"z_{k}.weight": w for k, w in zip("hxb", g["weight_z"].chunk(3), strict=True)}
        found |= {f"z_{k}.bias": b for k, b in zip("hx", g["bias_z"].chunk(2), strict=True)}
        kinds = [f"d_{kind}.{y}.weight" for kind in "hxb" for y in GATES]
        found |= dict(zip(kinds, g["weight_d"], strict=True))
        for y, x, h, b in zip(GATES, w_x, w_h, g["bias"].chunk(4), strict=True):
            found |= {f"w_x.{y}": x, f"w_h.{y}": h, f"d_b.{y}.bias": b}
        for part in ("weight", "bias"):
            for name in ("norm", "hyper.norm"):
                rows = g[f"{name.replace('.', '_')}_{part}"]
                found |= {f"{name}.{y}.{part}": row for y, row in zip("ifgoc", rows, strict=True)}
        return found


def lstm(p: Tensors, name: str, gates: list[Tensor], c: Tensor) -> Pair:
    """The state that four gates make of a cell, all layer-normalised under names ``name``."""

    def norm(y: str, t: Tensor) -> Tensor:
        return layer_norm(t, t.shape[-1:], p[f"{name}.{y}.weight"], p[f"{name}.{y}.bias"])

    i, f, g, o = (norm(y, t) for y, t in zip(GATES, gates, strict=True))
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * norm("c", c).tanh(), c


WORKLOADS = (HyperLSTM("hyper_lstm"),)
