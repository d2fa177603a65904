"""What a new user gets without a latent: one network for all, or one fitted to few rows. All have
the layers of a user's network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import hyperfast
from hyperfast.recipes.personal_model import FOLDERS, Users, accuracy, loss

WIDTH = 32
SPEC = hyperfast.MLPSpec((64, WIDTH, FOLDERS))
HEAD = WIDTH * FOLDERS + FOLDERS  # numbers of the last layer
TARGET = hyperfast.TargetNet()


def run(images: Tensor, flat: Tensor) -> Tensor:
    """Scores of ``images (n, R, 64)`` by the networks ``flat (n, P)``."""
    return TARGET(images, SPEC.split(flat))


def fresh(count: int) -> Tensor:
    """``(count, P)``: networks as ``nn.Linear`` starts them."""
    bound = torch.cat([torch.full((s.numel,), s.in_features**-0.5) for s in SPEC.layers])
    return (2 * torch.rand(count, SPEC.numel) - 1) * bound


def ceiling(users: Users) -> float:
    """The best accuracy of any single network: every image in the folder that most of the users
    put it in, who all have the same images."""
    return float(F.one_hot(users.folders).float().mean(0).amax(-1).mean())


def train(
    users: Users, *, own_heads: bool, steps: int, batch: int = 64, rows: int = 32, seed: int = 0
) -> Tensor:
    """``(n, P)``: one network for all users, or one with a last layer for each. Trained as long as
    the hypernetwork, on as many rows."""
    torch.manual_seed(seed)
    start = fresh(1).squeeze(0)
    layers = start[:-HEAD].clone().requires_grad_()
    heads = start[-HEAD:].repeat(len(users.images) if own_heads else 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([layers, heads])
    lr = 1e-2
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        ids = torch.randint(len(users.images), (batch, 1))
        which = torch.randint(users.images.shape[1], (batch, rows))
        head = heads[ids.squeeze(1) if own_heads else torch.zeros(batch, dtype=torch.int64)]
        flat = torch.cat([layers.expand(batch, -1), head], 1)
        loss(run(users.images[ids, which], flat), users.folders[ids, which]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    heads = heads.detach().expand(len(users.images), -1)
    return torch.cat([layers.detach().expand(len(heads), -1), heads], 1)


def best_fit(start: Tensor, users: Users, held: Users, *, free: int, steps: int) -> float:
    """Accuracy on held-out rows after the last ``free`` numbers of networks ``start (n, P)`` were
    fitted to users' rows: the best of three weight decays and of all times to stop.

    Both are chosen on the held-out rows themselves, in favour of this rival.
    """
    best = 0.0
    for decay in (0.0, 1e-2, 1.0):
        fixed = start[:, : SPEC.numel - free]
        fitted = start[:, SPEC.numel - free :].clone().requires_grad_()
        optimizer = torch.optim.AdamW([fitted], lr=1e-2, weight_decay=decay)
        for step in range(steps):
            flat = torch.cat([fixed, fitted], 1)
            if step % 10 == 0:
                with torch.no_grad():
                    best = max(best, accuracy(run(held.images, flat), held))
            # A sum over users: each has an optimum of its own.
            (len(start) * loss(run(users.images, flat), users.folders)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return best
