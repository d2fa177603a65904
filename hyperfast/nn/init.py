"""How heads start: so that what they generate is spread as the weights of a network of its own are
(hyperfan, Chang, Flokas, Lipson 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hyperfast.layout import Transform
from hyperfast.nn.heads import LayerHead

# Of what enters "exp" and "softplus", in whose image means count: W is e^(mean + SPREAD g).
SPREAD = 0.5


def before(transform: Transform | None, moment: float) -> tuple[float, float]:
    """Mean and deviation of normal numbers whose transforms have second moment ``moment``; exact
    but for softplus, which is taken for the exponential that it is near where it is small. A
    function is taken for the identity."""
    if transform == "square":  # E g^4 = 3
        return 0.0, (moment / 3) ** 0.25
    if transform in ("exp", "softplus"):  # E e^(2 SPREAD g) = e^(2 SPREAD^2)
        scale = math.sqrt(moment) * math.exp(-(SPREAD**2))
        return math.log(scale if transform == "exp" else math.expm1(scale)), SPREAD
    return 0.0, math.sqrt(moment)


def next_to_zero(dtype: torch.dtype) -> float:
    """An entry of head rows that generate zero. The sum of squares of a row must not vanish in
    float32, or weight normalisation divides zero by zero; 2**-24 is the least that float16 has."""
    limits = torch.finfo(dtype)
    return max(2**-60, limits.tiny * limits.eps)


def fill_rows(
    rows: Tensor, bias: Tensor | None, mean: float, deviation: float, moment: float
) -> None:
    """Rows ``(n, K)`` and biases ``(n,)`` of a head that generate numbers of this mean and
    deviation from features of second moment ``moment``. Without a bias there is no mean."""
    if deviation == 0:
        nn.init.constant_(rows, next_to_zero(rows.dtype))
    else:
        nn.init.normal_(rows, std=deviation / math.sqrt(moment * rows.shape[1]))
    if bias is not None:
        nn.init.constant_(bias, mean)


@torch.no_grad()
def fill_head(
    layer: LayerHead,
    rows: Sequence[tuple[Tensor, Tensor | None, float]],
    *,
    zero: bool = False,
    gain2: float = 1.0,
    out_fan: bool = False,
) -> None:
    """Starts the rows of a layer's head.

    Args:
        rows: of every generated tensor the head's rows ``(numel, K)`` and bias ``(numel,)``, and
            the second moment of its features.
        zero: generate a matrix of zeros: exactly, and with a rank by a ``B`` of zeros.
        gain2: the generated matrix has entries of second moment ``gain2 / fan``.
        out_fan: take the outputs for the fan.
    """
    matrices = 1 if layer.rank is None else 2
    wanted = gain2 / (layer.out_features if out_fan else layer.in_features)
    for n, (weight, bias, moment) in enumerate(rows):
        if n >= matrices:
            fill_rows(weight, bias, 0.0, 0.0, moment)
        elif zero and n == matrices - 1:
            nn.init.zeros_(weight)
            if bias is not None:
                nn.init.zeros_(bias)
        elif layer.rank is None:
            fill_rows(weight, bias, *before(layer.transform, wanted), moment)
        else:  # an entry of B A is a sum of `rank` products
            fill_rows(weight, bias, 0.0, math.sqrt(1 / layer.rank if n else wanted), moment)
