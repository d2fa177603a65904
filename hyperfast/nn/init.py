"""How heads start: so that what they generate is spread as the weights of a network of its own are
(hyperfan, Chang, Flokas, Lipson 2020)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hyperfast.layout import ParamSpec, Transform
from hyperfast.nn.copies import clone
from hyperfast.nn.heads import LayerHead, cut

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


class Start(Protocol):
    """What says how a generated tensor starts."""

    def fill(self, mean: float | Tensor, deviation: float) -> None: ...

    def zero(self) -> None: ...


class HeadRows(NamedTuple):
    """A head's rows ``(n, K)`` and biases ``(n,)``, and the second moment of its features."""

    weight: Tensor
    bias: Tensor | None
    moment: float = 1.0

    def split(self, spec: ParamSpec) -> list[HeadRows]:
        """Those of every tensor of ``spec``."""
        pieces = cut(self.weight, self.weight, self.bias, spec)
        return [HeadRows(weight, bias, self.moment) for _, weight, bias in pieces]

    def fill(self, mean: float | Tensor, deviation: float) -> None:
        """They generate numbers of this mean, one or one each, and deviation; without a bias there
        is no mean.
        Zeros are but next to zero: the sum of squares of a row must not vanish in float32, or
        weight normalisation divides zero by zero; 2**-24 is the least that float16 has."""
        if deviation == 0:
            limits = torch.finfo(self.weight.dtype)
            nn.init.constant_(self.weight, max(2**-60, limits.tiny * limits.eps))
        else:
            spread = math.sqrt(self.moment * self.weight.shape[1])
            nn.init.normal_(self.weight, std=deviation / spread)
        if self.bias is None:
            return
        if isinstance(mean, Tensor):
            self.bias.copy_(mean)
        else:
            nn.init.constant_(self.bias, mean)

    def zero(self) -> None:
        """They generate zeros, exactly."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


@torch.no_grad()
def start_layer(
    layer: LayerHead,
    rows: Sequence[Start],
    *,
    zero: bool = False,
    gain2: float = 1.0,
    out_fan: bool = False,
) -> None:
    """Starts the rows of a layer's head.

    Args:
        rows: of every generated tensor.
        zero: generate a matrix of zeros: with a rank, by a ``B`` of zeros.
        gain2: the generated matrix has entries of second moment ``gain2 / fan``.
        out_fan: take the outputs for the fan.
    """
    matrices = 1 if layer.rank is None else 2
    wanted = gain2 / (layer.out_features if out_fan else layer.in_features)
    for n, own in enumerate(rows):
        if zero and n >= matrices - 1:
            own.zero()
        elif n >= matrices:
            own.fill(0.0, 0.0)
        elif layer.rank is None:
            own.fill(*before(layer.transform, wanted))
        else:  # an entry of B A is a sum of `rank` products
            own.fill(0.0, math.sqrt(1 / layer.rank if n else wanted))


def start_layers(
    layers: Sequence[LayerHead],
    rows: Sequence[Start],
    base: Sequence[Tensor] | None,
    gain2: float,
    out_fan: bool,
) -> None:
    """Starts the heads of an MLP, and its base: it starts as a network of its own would."""
    each = iter(rows)
    for layer in layers:
        own = [next(each) for _ in layer.spec.shapes]
        start_layer(layer, own, zero=base is not None, gain2=gain2, out_fan=out_fan)
    for piece in base or ():
        if piece.ndim < 2:
            nn.init.zeros_(piece)
        else:
            nn.init.normal_(piece, std=math.sqrt(gain2 / piece.shape[0 if out_fan else 1]))


def start_at(
    values: Sequence[Tensor | None],
    spec: ParamSpec,
    rows: Sequence[Start],
    base: Sequence[Tensor] | None,
    gain2: float,
    out_fan: bool,
) -> None:
    """Starts the heads of any parameters, and their base, at these values; at random ones, by
    fan, where there is none."""
    for n, (own, shape, value) in enumerate(zip(rows, spec.shapes, values, strict=True)):
        deviation = 0.0
        if value is None and len(shape) > 1:
            receptive = math.prod(shape[2:])
            deviation = math.sqrt(gain2 / max(receptive * shape[0 if out_fan else 1], 1))
        if base is not None:
            own.zero()
            if value is None:
                nn.init.normal_(base[n], std=deviation)
            else:
                base[n].copy_(value)
            continue
        own.fill(0.0 if value is None else value.flatten(), deviation)


def starts(net: nn.Module, names: Sequence[str], whole: bool = False) -> Iterator[Tensor | None]:
    """The value at which each parameter starts for every latent, ``None`` for a random one; with
    ``whole``, the net's own for all."""
    again: dict[str, nn.Module] = {}
    for name in names:
        value = net.get_parameter(name).detach()
        if value.is_meta:
            path, _, own = name.rpartition(".")
            if path not in again:
                again[path] = _initialised(net.get_submodule(path))
            value = again[path].get_parameter(own).detach()
        known = not value.isnan().any()
        fixed = whole or value.ndim < 2 or _constant(value)
        yield value.clone() if known and fixed else None


@torch.no_grad()
def _initialised(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device with values, NaN where it does not set them itself."""
    module = clone(module).to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.fill_(math.nan)
    if callable(reset := getattr(module, "reset_parameters", None)):
        reset()
    return module


def _constant(value: Tensor) -> bool:
    return value.numel() > 1 and bool(value.min() == value.max())
