"""Five tasks, one after the other, and little forgotten: continual learning with a hypernetwork.

The method of von Oswald, Henning, Sacramento, Grewe 2020 ("Continual learning with hypernetworks")
on scikit-learn's digits, split into five tasks: 0 or 1, 2 or 3, and so on. Tasks come one by one,
no images of earlier ones are kept, and the task is known when an image is sorted. A chunked
hypernetwork makes a classifier of each task's latent, and remembers the earlier ones because it is
held to the weights that it made of their latents before, by the regulariser of their equation 2,
without the look-ahead to the step that an optimizer is about to take:

    loss(task T) + beta / (T - 1) * sum over t < T of |weights now(t) - weights before(t)|^2

    python -m hyperfast.recipes.continual --out continual.png

Beside it learn the same hypernetwork with beta = 0, and a single classifier that is simply trained
on: the one that is generated, and one with two outputs of its own for every task, which knows, too,
what task it sorts for. The tables and the picture show accuracies on held-out images: after each
task (down) of each task (across).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hyperfast
from hyperfast.recipes.digits_model import load_digits, replace
from hyperfast.recipes.options import parse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASKS, HELD_OUT, WIDTH, Z_DIM = 5, 100, 100, 8
EXTRAS = {"matplotlib": "matplotlib", "scikit-learn": "sklearn", "tqdm": "tqdm"}


class Task(NamedTuple):
    """Images ``(n, 64)`` of two digits and which of the two ``(n,)``; the same held out."""

    x: Tensor
    y: Tensor
    x_held: Tensor
    y_held: Tensor


def load(seed: int) -> list[Task]:
    """The tasks, each in random order, the last images held out."""
    digits = load_digits()
    order = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(seed))
    x, y = digits.pixels[order], digits.labels[order]
    tasks = []
    for task in range(TASKS):
        own = y // 2 == task
        parts = x[own], y[own] % 2
        tasks.append(Task(*(p[:-HELD_OUT] for p in parts), *(p[-HELD_OUT:] for p in parts)))
    return tasks


def classifier(outputs: int) -> nn.Sequential:
    layers = nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(WIDTH, outputs))


class TrainedOn(nn.Module):
    """One classifier with two outputs, or two for each of as many tasks as it has ``heads``."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.net = heads, classifier(2 * heads)

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.net(x).unflatten(1, (self.heads, 2))[:, task % self.heads]

    def begin(self, task: int) -> list[nn.Parameter]:
        """Before a task is learned; returns what is trained."""
        return [*self.parameters()]

    def loss(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        return F.cross_entropy(self(x, task), y)


class Generated(nn.Module):
    """A classifier for every task, made of its latent; ``beta`` holds those of earlier tasks."""

    def __init__(self, beta: float):
        super().__init__()
        self.beta = beta
        self.hyper, self.target = hyperfast.HyperNet.for_module(
            classifier(2), Z_DIM, chunks=300, hidden=(32,)
        )
        self.latents = nn.ParameterList(torch.randn(Z_DIM) for _ in range(TASKS))

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.target(x, self.hyper(self.latents[task]))

    def begin(self, task: int) -> list[nn.Parameter]:
        """As of :class:`TrainedOn`: latents of earlier tasks stay."""
        self.earlier = torch.stack([*self.latents])[:task].detach()
        with torch.no_grad():
            self.before = self.hyper(self.earlier)
        return [*self.hyper.parameters(), self.latents[task]]

    def loss(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """Weights of all tasks so far are made in one call."""
        made = self.hyper(torch.cat([self.earlier, self.latents[task].unsqueeze(0)]))
        loss = F.cross_entropy(self.target(x, [w[task] for w in made]), y)
        if task == 0 or self.beta == 0:
            return loss
        pairs = zip(made, self.before, strict=True)
        return loss + self.beta / task * sum((w[:task] - b).square().sum() for w, b in pairs)


LEARNERS: dict[str, Callable[[], TrainedOn | Generated]] = {
    "trained on": lambda: TrainedOn(1),
    "trained on, own outputs": lambda: TrainedOn(TASKS),
    "hypernetwork, beta = 0": lambda: Generated(0.0),
    "hypernetwork, beta = 0.1": lambda: Generated(0.1),
}


def learn(
    name: str,
    make: Callable[[], TrainedOn | Generated],
    tasks: Sequence[Task],
    *,
    steps: int,
    lr: float = 1e-3,
    seed: int = 0,
) -> Tensor:
    """``(after, of)``: accuracies on held-out images of each task, after each has been learned."""
    from tqdm import trange

    torch.manual_seed(seed)
    learner, rows = make(), []
    for task, (x, y, *_) in enumerate(tasks):
        optimizer = torch.optim.Adam(learner.begin(task), lr=lr)
        for _ in trange(steps, desc=f"{name}, task {task}", unit="step"):
            ids = torch.randint(len(x), (32,))
            loss = learner.loss(x[ids], y[ids], task)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = [learner(t.x_held, n).argmax(1) == t.y_held for n, t in enumerate(tasks)]
        rows.append(torch.stack(right).float().mean(1))
    return torch.stack(rows)


def forgetting(accuracies: Tensor) -> Tensor:
    """By how much the earlier tasks ``(...)`` end below their best, on average (Chaudhry et al.
    2018); of accuracies ``(..., after, of)``."""
    return (accuracies[..., :-1, :-1].amax(-2) - accuracies[..., -1, :-1]).mean(-1)


def picture(found: dict[str, Tensor]) -> Figure:
    """The accuracies ``(after, of)`` of every learner."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(found), 4.6), dpi=150, layout="compressed")
    labels = [f"{2 * task} or {2 * task + 1}" for task in range(TASKS)]
    axes = figure.subplots(1, len(found), sharey=True)
    for ax, (name, matrix) in zip(axes, found.items(), strict=True):
        ax.imshow(matrix.numpy(), cmap="viridis", vmin=0.4, vmax=1)
        for after, of in product(range(TASKS), repeat=2):
            value = float(matrix[after, of])
            color = "black" if value > 0.75 else "white"
            ax.text(of, after, f"{100 * value:.0f}", ha="center", va="center", color=color)
        ax.set_title(name)
        ax.set_xticks(range(TASKS), labels)
        ax.set_yticks(range(TASKS), labels)
        ax.set_xlabel("accuracy (%) of task")
    axes[0].set_ylabel("after task")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Learns all tasks with every learner, compares, draws; returns the exit status."""
    start = time.perf_counter()
    args = parse(argv, "continual", __doc__, EXTRAS, picture=True)
    seeds, steps = (1, 60) if args.quick else (5, 300)
    data = [load(seed) for seed in range(seeds)]
    found = {
        name: torch.stack(
            [learn(name, make, tasks, steps=steps, seed=n) for n, tasks in enumerate(data)]
        )
        for name, make in LEARNERS.items()
    }
    for name, matrices in found.items():
        print(f"\n{name}: accuracy (%) after each task, mean of {seeds} seed{'s' * (seeds > 1)}")
        for task, row in enumerate(100 * matrices.mean(0)):
            print(f"  {2 * task} or {2 * task + 1}   " + "".join(f"{v:7.1f}" for v in row.tolist()))
    print(f"\n{'':<28}average accuracy   forgetting, after all tasks (%)")
    for name, matrices in found.items():
        average, lost = 100 * matrices[:, -1].mean(), 100 * forgetting(matrices).mean()
        print(f"  {name:<26}{average:>10.1f}{lost:>17.1f}")
    one, hyper = (sum(p.numel() for p in m.parameters()) for m in (TrainedOn(1), Generated(0.0)))
    print(f"\nParameters: classifier {one:,}, hypernetwork and {TASKS} latents {hyper:,}")
    figure = picture({name: matrices.mean(0) for name, matrices in found.items()})
    replace(args.out, lambda tmp: figure.savefig(tmp, format="png"))
    print(f"Wrote {args.out}\n{time.perf_counter() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
