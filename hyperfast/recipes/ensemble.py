"""A hundred regressors train as one module, and their disagreement becomes prediction intervals.

Each network sees a bootstrap sample of scikit-learn's diabetes data (442 patients, 10 measurements,
the disease's progression a year later). All of them are one :class:`hyperfast.TaskMLP`; the same
networks, one ``nn.Module`` each in a loop, then learn from the same start on the same rows, to show
that nothing but the time is different:

    python -m hyperfast.recipes.ensemble

Every patient is missing from about 37 of the samples. The networks that never saw one say how wrong
the ensemble is on the unseen, and that is all the jackknife+-after-bootstrap needs (Kim, Xu, Barber
2020, "Predictive inference is free with the jackknife+-after-bootstrap"): intervals that hold for
any distribution of the data, without rows set aside to calibrate them.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import hyperfast
from hyperfast.recipes.options import parse

MEMBERS = 100
HELD_OUT = 100  # patients
WIDTH = 32


class Data(NamedTuple):
    """``x (n, 10)`` and ``y (n,)`` to learn from, standardised; the same held out; and how much of
    the disease's measure one unit of ``y`` is."""

    x: Tensor
    y: Tensor
    x_held: Tensor
    y_held: Tensor
    unit: float


def load(seed: int = 0) -> Data:
    """The patients in random order, the last of them held out."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(seed))
    x, y = (torch.tensor(part, dtype=torch.float32)[order] for part in (data.data, data.target))
    seen = len(x) - HELD_OUT
    x = (x - x[:seen].mean(0)) / x[:seen].std(0)
    unit = y[:seen].std()
    y = (y - y[:seen].mean()) / unit
    return Data(x[:seen], y[:seen], x[seen:], y[seen:], float(unit))


def networks(seed: int = 0) -> list[nn.Module]:
    """One module a member, as PyTorch starts them."""
    torch.manual_seed(seed)
    return [
        nn.Sequential(nn.Linear(10, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)) for _ in range(MEMBERS)
    ]


def train(
    name: str,
    run: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
) -> tuple[Tensor, float]:
    """Fits all members, each to its rows ``x (members, n, 10)`` and ``y (members, n)``; returns
    the losses ``(steps, members)`` and the seconds of a step."""
    from tqdm import tqdm

    # The decay is the best of four by the errors on patients that members have not seen.
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.03)
    losses = []
    start = time.perf_counter()
    for _ in tqdm(range(steps), desc=name, unit="step"):
        loss = (run(x).squeeze(2) - y).square().mean(1)
        optimizer.zero_grad()
        loss.sum().backward()  # a sum: each member has a loss of its own
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), (time.perf_counter() - start) / steps


def intervals(
    seen: Tensor, unseen: Tensor, y: Tensor, rows: Tensor, cover: float = 0.9
) -> tuple[Tensor, Tensor]:
    """Lower and upper ends ``(m,)`` by the jackknife+-after-bootstrap.

    Args:
        seen: ``(members, n)``, what every member says of the rows that are learned from.
        unseen: ``(members, m)``, and of others.
        y: ``(n,)``, the truth of the first.
        rows: ``(members, n)``, which of them each member learned from.
        cover: how many of the others' truths should lie within.
    """
    out = torch.ones_like(seen).scatter_(1, rows, 0.0)  # 1 where a member has not seen a row
    out /= out.sum(0)
    error = (y - (out * seen).sum(0)).abs().unsqueeze(1)
    without = out.T @ unseen  # (n, m): of the members that have not seen row i
    n = len(y)
    rank = min(math.ceil(cover * (n + 1)), n)
    lower = (without - error).kthvalue(n + 1 - rank, dim=0).values
    return lower, (without + error).kthvalue(rank, dim=0).values


def main(argv: Sequence[str] | None = None) -> int:
    """Learns twice, compares, calibrates; returns the exit status."""
    start = time.perf_counter()
    args = parse(argv, "ensemble", __doc__, {"scikit-learn": "sklearn", "tqdm": "tqdm"})
    steps, race = (200, 20) if args.quick else (400, 100)
    data = load()
    modules = networks()
    ensemble = hyperfast.TaskMLP.from_modules(modules)
    rows = torch.randint(len(data.x), (MEMBERS, len(data.x)))
    x, y = data.x[rows], data.y[rows]
    print(f"{MEMBERS} networks, {len(data.x)} patients to learn from, {HELD_OUT} held out")

    losses, seconds = train("as one module", ensemble, ensemble.parameters(), x, y, steps=steps)

    def loop(x: Tensor) -> Tensor:
        return torch.stack([net(rows) for net, rows in zip(modules, x, strict=True)])

    parameters = [p for net in modules for p in net.parameters()]
    same, slow = train("in a loop", loop, parameters, x, y, steps=race)
    apart = ((losses[:race] - same) / same).abs().max()

    with torch.no_grad():
        seen, unseen = (ensemble(part.unsqueeze(0)).squeeze(2) for part in (data.x, data.x_held))
    lower, upper = intervals(seen, unseen, data.y, rows)
    width = data.unit * (upper - lower).mean()
    within = ((lower <= data.y_held) & (data.y_held <= upper)).float().mean()

    def rmse(guess: Tensor) -> float:
        return data.unit * float((guess - data.y_held).square().mean().sqrt())

    ones = torch.ones(len(data.x) + HELD_OUT, 1)
    linear = torch.linalg.lstsq(torch.cat([data.x, ones[HELD_OUT:]], 1), data.y.unsqueeze(1))
    straight = torch.cat([data.x_held, ones[:HELD_OUT]], 1) @ linear.solution
    print(f"""
Root mean squared error on the held-out patients
  the ensemble's mean          {rmse(unseen.mean(0)):6.1f}
  its members, on average      {sum(map(rmse, unseen)) / MEMBERS:6.1f}
  a linear regression          {rmse(straight.squeeze(1)):6.1f}
  the mean of those learned    {rmse(torch.zeros(HELD_OUT)):6.1f}

Intervals meant for 90% of them hold {within:.0%}; they are {width:.0f} wide

The loop's first {race} losses of every network differ by at most {apart:.0e} of themselves.
A step of the loop takes {slow * 1e3:.1f} ms, {slow / seconds:.1f} times that of the one module.
{time.perf_counter() - start:.0f} s in all""")
    return 0


if __name__ == "__main__":
    sys.exit(main())
