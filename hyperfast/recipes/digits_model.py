"""One latent a digit, one hypernetwork, and a small network ``(x, y) -> ink`` for every digit."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hyperfast

SIDE = 8  # pixels
ZOOM = 4  # the scans had 32x32 points


class Digits(NamedTuple):
    """``pixels (n, 64)`` in [0, 1]; ``kept (n, 64)``, False where a pixel is held out; labels."""

    pixels: Tensor
    kept: Tensor
    labels: Tensor


def load_digits(held_out: float = 0.25, seed: int = 0) -> Digits:
    """The digits of scikit-learn, the same number of random pixels held out of each."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.tensor(data.data / 16, dtype=torch.float32)
    return Digits(pixels, keep_mask(pixels.shape, held_out, seed), torch.tensor(data.target))


def keep_mask(shape: Sequence[int], held_out: float, seed: int) -> Tensor:
    """``(n, pixels)`` bool: in every row, ``held_out`` of the entries are False."""
    noise = torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed))
    return noise.argsort(1).argsort(1) >= round(held_out * shape[1])


def psnr(image: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, for a peak of 1."""
    return -10 * math.log10((image - truth).square().mean().item())


def grid(side: int, per_pixel: int = 1) -> Tensor:
    """``(side**2 * per_pixel**2, 2)``: points (x, y) in [-1, 1], those of one pixel together."""
    n = side * per_pixel
    axis = (2 * torch.arange(n) + 1) / n - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    blocks = torch.stack((x, y), -1).unflatten(1, (side, -1)).unflatten(0, (side, -1))
    return blocks.transpose(1, 2).reshape(-1, 2)


@dataclass(frozen=True)
class Sizes:
    """What rebuilds the model: sizes of latent, trunk and target, and the highest frequency."""

    digits: int
    z_dim: int = 32
    trunk: int = 64
    width: int = 32
    frequency: int = 3


class DigitFields(nn.Module):
    """One latent a digit, and the hypernetwork that makes a network ``(x, y) -> ink`` of each."""

    frequencies: Tensor

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        f = range(-sizes.frequency, sizes.frequency + 1)
        half_disc = [
            (i, j) for i in f for j in f if (i, j) > (0, 0) and i * i + j * j <= f[-1] ** 2
        ]
        frequencies = torch.tensor(half_disc).T * (math.pi / 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.latents = nn.Embedding(sizes.digits, sizes.z_dim)
        hyper = hyperfast.HyperNet(
            sizes.z_dim,
            2 * len(half_disc),
            sizes.width,
            1,
            hidden=sizes.trunk,
            target_activation="sin",
        )
        self.model = hyperfast.HyperMLP(hyper)
        # All digits start as nearly one network, and part as they learn. Latents that start far
        # apart would each be learned by heart.
        nn.init.normal_(self.latents.weight, std=0.01)
        with torch.no_grad():
            hyper.head.bias.copy_(hyper.generator(torch.randn(sizes.z_dim)))

    def forward(self, points: Tensor, z: Tensor) -> Tensor:
        """Ink in [0, 1] at ``points (N, 2)``, by the networks of ``z (B, z_dim)``: ``(B, N)``."""
        logits = self.model(self.features(points).expand(len(z), -1, -1), z)
        return logits.squeeze(-1).sigmoid()

    def features(self, points: Tensor) -> Tensor:
        """Fourier features of ``points (N, 2)``: ``(N, F)``."""
        angles = points @ self.frequencies
        return torch.cat((angles.sin(), angles.cos()), -1)

    def pixels(self, z: Tensor, points_per_side: int = ZOOM) -> Tensor:
        """``(B, 64)``: the ink averaged over each of the 8x8 pixels."""
        ink = self(grid(SIDE, points_per_side), z)
        return ink.unflatten(1, (SIDE * SIDE, -1)).mean(-1)

    def draw(self, z: Tensor, side: int = SIDE * ZOOM) -> Tensor:
        """``(B, side, side)``: every network draws its digit, in one call."""
        return self(grid(side), z).unflatten(1, (side, side))


def train(
    digits: Digits,
    *,
    epochs: int,
    batch: int = 64,
    lr: float = 5e-3,
    latent_lr: float = 3e-2,
    noise: float = 0.3,
    shrink: float = 1e-2,
    seed: int = 0,
) -> DigitFields:
    """Fits hypernetwork and latents to the kept pixels."""
    from tqdm import tqdm

    torch.manual_seed(seed)
    fields = DigitFields(Sizes(len(digits.pixels)))
    optimizer = torch.optim.Adam(
        [
            {"params": fields.model.parameters(), "lr": lr},
            {"params": fields.latents.parameters(), "lr": latent_lr},
        ]
    )
    steps = epochs * math.ceil(len(digits.pixels) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [lr, latent_lr], total_steps=steps, pct_start=0.1
    )
    with tqdm(total=steps, desc="learning", unit="step") as bar:
        for _ in range(epochs):
            for ids in torch.randperm(len(digits.pixels)).split(batch):
                z = fields.latents(ids)
                # Four points a pixel are enough to learn from; pictures are read with sixteen.
                ink = fields.pixels(z + noise * torch.randn_like(z), points_per_side=2)
                kept = digits.kept[ids].float()
                loss = F.binary_cross_entropy(ink, digits.pixels[ids], weight=kept)
                (loss + shrink * z.square().mean()).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.4f}")
    return fields


def save(fields: DigitFields, path: Path) -> None:
    """Writes parameters, latents and sizes as safetensors; ``path`` is whole or absent."""
    from safetensors.torch import save_file

    metadata = {"sizes": json.dumps(asdict(fields.sizes))}
    replace(path, lambda tmp: save_file(fields.state_dict(), tmp, metadata))


def load(path: Path) -> DigitFields:
    """The model that :func:`save` wrote."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        fields = DigitFields(Sizes(**json.loads(file.metadata()["sizes"])))
        fields.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return fields


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, then puts it in its place."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(tmp)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
