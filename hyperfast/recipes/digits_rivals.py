"""What the demo is measured against: interpolation, and other ways to run many networks."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast.recipes.digits_model import SIDE, ZOOM, DigitFields, Digits, grid

if TYPE_CHECKING:
    import numpy as np


def bicubic(points: np.ndarray, values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Piecewise bicubic through scattered pixels (Clough-Tocher), nearest outside their hull."""
    from scipy.interpolate import CloughTocher2DInterpolator, NearestNDInterpolator

    smooth = CloughTocher2DInterpolator(points, values)(where)
    outside = smooth != smooth  # that is, NaN
    smooth[outside] = NearestNDInterpolator(points, values)(where[outside])
    return smooth


def radial(points: np.ndarray, values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Gaussian radial basis functions; of all kernels, widths and smoothings tried, the best.

    They were tuned on the held-out pixels themselves, in favour of this rival.
    """
    from scipy.interpolate import RBFInterpolator

    fit = RBFInterpolator(points, values, kernel="gaussian", epsilon=3, smoothing=0.03)
    return fit(where)


def interpolate(method: Callable, digits: Digits, side: int = SIDE) -> Tensor:
    """``(n, side**2)``: every digit interpolated from its own kept pixels."""
    pixels, where = grid(SIDE).double(), grid(side).double().numpy()
    images = [
        torch.from_numpy(method(pixels[kept].numpy(), values[kept].numpy(), where))
        for values, kept in zip(digits.pixels.double(), digits.kept, strict=True)
    ]
    return torch.stack(images).float().clamp(0, 1)


def neighbours(digits: Digits) -> Tensor:
    """``(n, 64)``: hidden pixels from the eight digits most alike; a rival that knows them all."""
    from sklearn.impute import KNNImputer

    known = digits.pixels.masked_fill(~digits.kept, float("nan")).numpy()
    filled = KNNImputer(n_neighbors=8, weights="distance").fit_transform(known)
    return torch.from_numpy(filled).float()


def loop(fields: DigitFields, points: Tensor) -> Tensor:
    """Rival: one network after the other, as everyone writes it first."""
    features, images = fields.features(points), []
    for z in fields.latents.weight:
        w1, b1, w2, b2 = fields.model.hyper(z)
        hidden = F.linear(features, w1, b1).sin_()
        images.append(F.linear(hidden, w2, b2).sigmoid_().squeeze(-1))
    return torch.stack(images)


def bmm(fields: DigitFields, points: Tensor) -> Tensor:
    """Rival: all weights first, then batched matrix products."""
    w1, b1, w2, b2 = fields.model.hyper(fields.latents.weight)
    features = fields.features(points).expand(len(w1), -1, -1)
    hidden = torch.baddbmm(b1.unsqueeze(1), features, w1.mT).sin_()
    return torch.baddbmm(b2.unsqueeze(1), hidden, w2.mT).sigmoid_().squeeze(-1)


@torch.no_grad()
def race(fields: DigitFields, rounds: int) -> dict[str, float]:
    """Median seconds in which all networks draw at 4x: hyperfast and its rivals, interleaved."""
    points = grid(SIDE * ZOOM)
    runners = {
        "hyperfast": lambda: fields(points, fields.latents.weight),
        "bmm": lambda: bmm(fields, points),
        "loop": lambda: loop(fields, points),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    truth = runners["hyperfast"]()
    for _ in range(rounds):
        for name, run in runners.items():
            start = time.perf_counter()
            drawn = run()
            seconds[name].append(time.perf_counter() - start)
            torch.testing.assert_close(drawn, truth, rtol=1e-4, atol=1e-4)
    return {name: median(times) for name, times in seconds.items()}
