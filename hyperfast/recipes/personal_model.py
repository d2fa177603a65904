"""Users who each sort digits in a way of their own: the data, one latent a user, and how a new
user's is found."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hyperfast

DIGITS = 10
FOLDERS = 3
FEW = 30  # rows of a new user


class Users(NamedTuple):
    """``images (n, R, 64)`` in [0, 1] and the ``folders (n, R)`` that each user puts them in."""

    images: Tensor
    folders: Tensor


class Data(NamedTuple):
    """``known``: rows of the users to learn from; ``new``: the few of users who come later.
    ``known_held`` and ``new_held``: both on images that nobody learns from."""

    known: Users
    known_held: Users
    new: Users
    new_held: Users


def load(known: int, new: int, rows: int = 100, seed: int = 0) -> Data:
    """The 8x8 digits of scikit-learn, which are real, sorted by users, who are not: each puts the
    ten digits into three folders at random, no folder empty, and no user as another does.

    500 images are held out of all learning, and another 297 are for new users alone.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.data), generator=rng)
    images = torch.tensor(data.data / 16, dtype=torch.float32)[order]
    digits = torch.tensor(data.target)[order]
    tastes = torch.randint(FOLDERS, (2 * (known + new), DIGITS), generator=rng).unique(dim=0)
    tastes = tastes[(tastes.sort(1).values.diff(dim=1) > 0).sum(1) == FOLDERS - 1]
    tastes = tastes[torch.randperm(len(tastes), generator=rng)[: known + new]]

    def sort(tastes: Tensor, which: Tensor) -> Users:
        return Users(images[which], tastes.gather(1, digits[which]))

    def draw(users: int, first: int, last: int, count: int) -> Tensor:
        noise = torch.rand(users, last - first, generator=rng)
        return first + noise.argsort(1)[:, :count]

    held = torch.arange(500)
    return Data(
        sort(tastes[:known], draw(known, 797, len(images), rows)),
        sort(tastes[:known], held.expand(known, -1)),
        sort(tastes[known:], draw(new, 500, 797, FEW)),
        sort(tastes[known:], held.expand(new, -1)),
    )


class Sorters(nn.Module):
    """One latent a user, and the hypernetwork that makes a network ``image -> folder`` of each."""

    def __init__(self, users: int, z_dim: int = 32, width: int = 32):
        super().__init__()
        self.latents = nn.Embedding(users, z_dim)
        nn.init.normal_(self.latents.weight, std=0.1)
        hyper = hyperfast.HyperNet(z_dim, 64, width, FOLDERS, hidden=64)
        self.model = hyperfast.HyperMLP(hyper)

    def forward(self, images: Tensor, z: Tensor) -> Tensor:
        """Scores ``(B, R, 3)`` of ``images (B, R, 64)`` by the networks of ``z (B, z_dim)``."""
        return self.model(images, z)


def loss(scores: Tensor, folders: Tensor) -> Tensor:
    """Mean cross-entropy of ``scores (..., 3)``."""
    return F.cross_entropy(scores.flatten(0, -2), folders.flatten())


def accuracy(scores: Tensor, users: Users) -> float:
    """The share of rows that go into the right folder."""
    return float((scores.argmax(-1) == users.folders).float().mean())


def train(
    users: Users,
    *,
    steps: int,
    batch: int = 64,
    rows: int = 32,
    lr: float = 3e-3,
    latent_lr: float = 3e-2,
    shrink: float = 1e-3,
    seed: int = 0,
) -> Sorters:
    """Fits hypernetwork and latents, a batch of users and of their rows at a time."""
    torch.manual_seed(seed)
    sorters = Sorters(len(users.images))
    optimizer = torch.optim.Adam(
        [
            {"params": sorters.model.parameters(), "lr": lr},
            {"params": sorters.latents.parameters(), "lr": latent_lr},
        ]
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [lr, latent_lr], total_steps=steps)
    for _ in range(steps):
        ids = torch.randint(len(users.images), (batch, 1))
        which = torch.randint(users.images.shape[1], (batch, rows))
        z = sorters.latents(ids.squeeze(1))
        scores = sorters(users.images[ids, which], z)
        (loss(scores, users.folders[ids, which]) + shrink * z.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return sorters.requires_grad_(False)


def adapt(
    sorters: Sorters, users: Users, *, steps: int = 150, lr: float = 5e-2, shrink: float = 1e-2
) -> Tensor:
    """Latents ``(n, z_dim)`` of new users, from their rows alone; the hypernetwork stays as it is.

    They start from the mean of the known ones, all users in one batch, each for itself.
    """
    known = sorters.latents.weight
    z = known.mean(0).repeat(len(users.images), 1).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=lr)
    spread = known.std(0)
    for _ in range(steps):
        far = ((z - known.mean(0)) / spread).square().mean()
        error = loss(sorters(users.images, z), users.folders)
        (len(z) * (error + shrink * far)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return z.detach()
