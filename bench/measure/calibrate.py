"""Every plan of a generated layer timed over a grid of sizes; rates fitted to these times; what a
choice by some rates, or by the rule of the C++ kernels, would cost."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.measure import machine
from bench.measure.race import race, rounded
from bench.workloads import WORKLOADS, Workload
from hyperfast.kernels import eager
from hyperfast.layout import Generated
from hyperfast.plans import choose
from hyperfast.plans.sizes import Sizes, Work

PASSES, ROUNDS = 3, 2  # over the grid, and in each of them over the plans of a layer
HOPELESS = 10  # times the FLOPs of another plan: not timed
DTYPE = torch.float32

Row = dict[str, Any]  # {"device": ..., "layer": [...], "seconds": {plan: ...}}


def table_layers() -> list[Sizes]:
    """Every layer of the bench table."""
    layers = [
        Sizes(w.B, w.B * w.N, i, o, w.H)
        for w in WORKLOADS.values()
        if isinstance(w, Workload)
        for i, o in w.layers
    ]
    return list(dict.fromkeys(layers))


def grid() -> list[Sizes]:
    """The bench table, a spread around it, and weights that fill no cache."""
    spread = [
        Sizes(tasks, tasks * rows, i, o, features)
        for i, o in ((2, 64), (8, 32), (32, 1), (64, 10), (64, 64), (128, 128))
        for features in (32, 128)
        for tasks in (1, 4, 16, 64, 256)
        for rows in (1, 8, 64)
    ]
    large = [Sizes(2048, 2048 * rows, 128, 128, 32) for rows in (1, 8)]
    return list(dict.fromkeys(table_layers() + spread + large))


def calls(layer: Sizes, device: str) -> dict[str, Callable[[], Tensor]]:
    """The forward pass of a layer by every plan that is worth timing."""
    b, r, i, _, k, *_ = layer
    x, h = torch.randn(b, r // b, i), torch.randn(b, k)
    weight, bias = torch.randn(layer.params, k), torch.randn(layer.params)
    op = torch.ops.hyperfast.hyper_linear.default if device == "cpp" else eager.hyper_linear
    flops = {name: cost.flops for name, cost in choose.costs(layer, DTYPE, device).items()}
    names = [name for name in flops if flops[name] <= HOPELESS * min(flops.values())]
    made = Generated.of_head(weight, bias, i, True)
    return {name: partial(op, x, h, *made, None, "", name) for name in names}


def time_all(layers: Sequence[Sizes], device: str) -> list[Row]:
    """Seconds of every plan: of all rounds' medians the first quartile, as others only add time.
    The whole grid is passed several times in changing order, so that no layer always meets the
    same disturbance."""
    samples: dict[Sizes, dict[str, list[float]]] = {layer: {} for layer in layers}
    for number in range(PASSES):
        for layer in random.Random(number).sample(layers, len(layers)):
            plans = calls(layer, device)
            for call in plans.values():
                call()
            for name, rounds in race(plans, ROUNDS).items():
                samples[layer].setdefault(name, []).extend(map(median, rounds))
    return [
        {
            "device": device,
            "layer": layer[:5],
            "seconds": {
                name: rounded(sorted(times)[len(times) // 4])
                for name, times in samples[layer].items()
            },
        }
        for layer in layers
    ]


def fit(rows: Sequence[Row], device: str, steps: int = 2000) -> dict[str, Work]:
    """The rates of every plan, from the rows of one device: least squares of log time and of the
    log regret of a soft choice; from there a search that lowers the worst regrets of the hard one.

    The first keeps every prediction near its measurement, whatever its size; the others weigh what
    the model is for.
    """
    plans = list(choose.RATES[device])
    tables = [choose.work(Sizes(*row["layer"]), DTYPE.itemsize, device) for row in rows]
    amounts = torch.tensor([[t[name] for name in plans] for t in tables], dtype=torch.float64)
    seconds = [[row["seconds"].get(name, math.inf) for name in plans] for row in rows]
    time = torch.tensor(seconds, dtype=torch.float64).log()  # (rows, plans); amounts: (.., kinds)
    lost = (time - time.amin(1, keepdim=True)).clamp_max(math.log(HOPELESS))
    rates = _search(amounts, time, lost, _descend(amounts, time, lost, steps), 5 * steps)
    values = rates.exp() * (amounts > 0).any(0)
    return {
        name: Work(*(rounded(v, 3) or 0 for v in row))
        for name, row in zip(plans, values.tolist(), strict=True)
    }


def _log_time(amounts: Tensor, rates: Tensor) -> Tensor:
    return (amounts * rates.exp()).sum(-1).log()


def _descend(amounts: Tensor, time: Tensor, lost: Tensor, steps: int) -> Tensor:
    """Log rates (plans, kinds) by gradient descent; choices are softened by 3% of a time."""
    timed = time.isfinite()
    # At first every kind of work takes its share of the time of a typical layer.
    typical = amounts.clamp_min(1).log().mean(0)
    share = torch.where(timed, time, 0).sum(0) / timed.sum(0) - math.log(amounts.shape[-1])
    rates = (share.unsqueeze(1) - typical).requires_grad_()
    optimizer = torch.optim.Adam([rates], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        predicted = _log_time(amounts, rates)
        error = torch.where(timed, predicted - time, 0).square().sum() / timed.sum()
        chosen = torch.softmax(-predicted / 0.03, 1)
        loss = error + 30 * (chosen * lost).sum(1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return rates.detach()


def _search(amounts: Tensor, time: Tensor, lost: Tensor, rates: Tensor, steps: int) -> Tensor:
    """Random changes of some rates, small and large, kept when they lower the 8-norm of regrets."""
    generator = torch.Generator().manual_seed(0)

    def score(rates: Tensor) -> float:
        predicted = torch.where(time.isfinite(), _log_time(amounts, rates), math.inf)
        return lost.gather(1, predicted.argmin(1, keepdim=True)).pow(8).sum().item()

    best = score(rates)
    for _ in range(steps):
        scale = 0.03 * 40 ** torch.rand((), generator=generator)
        some = torch.rand(rates.shape, generator=generator) < 0.3
        step = torch.randn(rates.shape, generator=generator, dtype=rates.dtype)
        trial = rates + scale * some * step
        if (found := score(trial)) < best:
            rates, best = trial, found
    return rates


def regret(row: Row, rates: dict[str, Work] | None) -> tuple[float, str]:
    """How many times longer the plan of least cost (without rates: the one that is chosen now)
    takes than the fastest one, and which it is."""
    layer = Sizes(*row["layer"])
    if rates is None:
        chosen = choose.choose(layer, DTYPE, row["device"])
    else:
        table = choose.work(layer, DTYPE.itemsize, row["device"])
        chosen = min(row["seconds"], key=lambda name: table[name].seconds(rates[name]))
    return row["seconds"][chosen] / min(row["seconds"].values()), chosen


def measure(threads: int) -> dict[str, object]:
    """Measures everything on so many threads."""
    machine.use_threads(threads)
    devices = ["cpu"]
    if choose.device_key("cpu", torch.float32) == "cpp":
        devices.append("cpp")
    with torch.no_grad():
        rows = [row for device in devices for row in time_all(grid(), device)]
    return {**machine.circumstances(threads), "results": rows}
