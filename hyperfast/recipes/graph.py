"""What bonds do to atoms, learned by a convolution that sees them; without, most of it is lost.

Synthetic graphs of the size of QM9's molecules (18 atoms and 36 directed bonds on average, at most
four an atom): atoms of five elements, bonds of four kinds and of some strain, all at random. A bond
adds ``stiffness * strain ** 2`` to the energy of both its atoms, and stiffness depends on its kind
and on the two elements. Atoms' energies are learned from examples by message passing (Gilmer et al.
2017) with :class:`hyperfast.nets.NNConv`: a network makes a matrix of every bond's features, and
what atoms tell each other goes through it (Simonovsky, Komodakis 2017):

    python -m hyperfast.recipes.graph

The same network learns once more with all bonds alike. Then a convolution is timed beside the
formula as it is written, in which the matrix of every bond is stored.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast.nets import NNConv
from hyperfast.recipes.graph_rival import race
from hyperfast.recipes.options import parse

ELEMENTS, KINDS, MOST_BONDS = 5, 4, 4
CHANNELS = 32  # of the convolution that is timed; half as many learn


class Graphs(NamedTuple):
    """Many graphs as one: ``element (V,)`` of atoms; ``bonds (2, E)``, each in both directions, and
    their ``features (E, 5)``, kind and strain; ``energy (V,)`` of atoms."""

    element: Tensor
    bonds: Tensor
    features: Tensor
    energy: Tensor


def skeleton(size: int, choose: random.Random) -> set[tuple[int, int]]:
    """Bonds of a random tree, and up to three more, which close rings."""
    free = [MOST_BONDS] * size
    pairs = set()

    def some(among: int) -> int:
        return choose.choice([n for n in range(among) if free[n]])

    for new in range(1, size + choose.randint(0, 3)):
        a, b = (some(new), new) if new < size else (some(size), some(size))
        if a != b:
            pairs.add((min(a, b), max(a, b)))
            free[a] -= 1
            free[b] -= 1
    return pairs


def draw(count: int, seed: int) -> Graphs:
    """Random graphs; the law of their energies is the same for every seed."""
    choose, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    sizes = [choose.randint(12, 24) for _ in range(count)]
    pairs, begin = [], 0
    for size in sizes:
        pairs += [(begin + a, begin + b) for a, b in sorted(skeleton(size, choose))]
        begin += size
    bonds = torch.tensor(pairs).T
    element = torch.randint(ELEMENTS, (begin,), generator=rng)
    kind = torch.randint(KINDS, (len(pairs),), generator=rng)
    strain = 2 * torch.rand(len(pairs), generator=rng) - 1
    law = torch.rand(KINDS, ELEMENTS, ELEMENTS, generator=torch.Generator().manual_seed(0))
    a, b = element[bonds]
    held = (law + law.mT)[kind, a, b] * strain.square()
    bonds = torch.cat([bonds, bonds.flip(0)], 1)
    energy = torch.zeros(begin).index_add(0, bonds[1], held.repeat(2))
    features = torch.cat([F.one_hot(kind, KINDS).float(), strain.unsqueeze(1)], 1)
    return Graphs(element, bonds, features.repeat(2, 1), energy)


def convolution(width: int, edge_width: int) -> NNConv:
    """``width`` channels to as many; matrices are made by two layers."""
    edges = (nn.Linear(KINDS + 1, edge_width), nn.SiLU(), nn.Linear(edge_width, width * width))
    return NNConv(width, width, nn.Sequential(*edges))


class MessagePassing(nn.Module):
    """Atoms that hear of their neighbours twice; each then says its energy."""

    def __init__(self, width: int = CHANNELS // 2):
        super().__init__()
        self.atoms = nn.Embedding(ELEMENTS, width)
        self.convs = nn.ModuleList([convolution(width, 2 * width) for _ in range(2)])
        self.energy = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, graphs: Graphs) -> Tensor:
        """Energies ``(V,)``."""
        x = self.atoms(graphs.element)
        for conv in self.convs:
            x = x + F.silu(conv(x, graphs.bonds, graphs.features))
        return self.energy(x).squeeze(1)


def blind(graphs: Graphs) -> Graphs:
    """The same with all bonds alike."""
    return graphs._replace(features=torch.ones_like(graphs.features))


def train(
    name: str, graphs: Sequence[Graphs], *, steps: int, lr: float = 1e-2, seed: int = 0
) -> MessagePassing:
    """Fits the energies of batches ``graphs``, one a step, in turn."""
    from tqdm import tqdm

    torch.manual_seed(seed)
    net = MessagePassing()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in tqdm(range(steps), desc=name, unit="step"):
        batch = graphs[step % len(graphs)]
        loss = F.mse_loss(net(batch), batch.energy)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net


@torch.no_grad()
def unexplained(net: MessagePassing, graphs: Graphs) -> float:
    """The error's share of the energies' variance."""
    return float((net(graphs) - graphs.energy).square().mean() / graphs.energy.var(correction=0))


def main(argv: Sequence[str] | None = None) -> int:
    """Learns twice, compares, times; returns the exit status."""
    start = time.perf_counter()
    args = parse(argv, "graph", __doc__, {"tqdm": "tqdm"})
    count, steps, rounds = (20, 300, 3) if args.quick else (80, 1000, 7)
    batches, held = [draw(50, seed) for seed in range(count)], draw(500, count)
    print(f"{50 * count:,} synthetic graphs to learn from, 500 held out")
    seeing = unexplained(train("seeing", batches, steps=steps), held)
    blinded = unexplained(train("blind", [*map(blind, batches)], steps=steps), blind(held))
    found = race(convolution(CHANNELS, 2 * CHANNELS), held.bonds, held.features, rounds)
    print(f"""
Variance of held-out atoms' energies that is not explained
  by bonds' features           {seeing:8.1%}
  by the same, all bonds alike {blinded:8.1%}

A convolution and its gradients, {CHANNELS} channels, {held.bonds.shape[1]:,} directed bonds""")
    for name, (seconds, kept) in found.items():
        print(
            f"  {name:<10}{1e3 * seconds:8.1f} ms, {seconds / found['NNConv'][0]:.1f} of NNConv's; "
            f"{kept / 1e6:.1f} MB kept for the gradients"
        )
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
