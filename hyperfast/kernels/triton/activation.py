"""What follows a layer, as :data:`hyperfast.activations.KNOWN` says it, inside a kernel; and what
becomes of a weight before it is used, as :data:`hyperfast.layout.TRANSFORMS` does.

Sums are fp32 or fp64 here. NaN passes through each of them, as it does in PyTorch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from hyperfast.activations import KNOWN
from hyperfast.layout import Network


@triton.jit
def _expm1(z):
    """``exp(z) - 1``; where the difference would lose digits, by its series, whose next term is
    below 1e-13 of it."""
    series = 1 + z * (1 / 10)
    for n in tl.static_range(9, 1, -1):
        series = 1 + z * (1 / n) * series
    return tl.where(tl.abs(z) < 0.25, z * series, tl.exp(z) - 1)


@triton.jit
def _log1p(u):
    """``log(1 + u)``, ``u >= 0``: what rounding takes from ``1 + u`` it takes from both factors."""
    w = 1 + u
    return tl.where(w == 1, u, tl.log(w) * (u / tl.where(w == 1, 1.0, w - 1)))


@triton.jit
def _tanh(z):
    u = _expm1(-2 * tl.abs(z))
    t = -u / (2 + u)
    return tl.where(z < 0, -t, t)


# sqrt(1 / 2), 1 / sqrt(2 pi), sqrt(2 / pi)
_HALF_ROOT = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)
_ROOT = tl.constexpr(0.7978845608028654)
_CUBE = tl.constexpr(0.044715)


@triton.jit
def activate(pre, NAME: tl.constexpr, PARAMETER: tl.constexpr):
    y = pre
    if NAME == "relu":
        y = tl.where(pre <= 0, 0.0, pre)
    elif NAME == "leaky_relu":
        y = tl.where(pre > 0, pre, pre * PARAMETER)
    elif NAME == "elu":
        y = tl.where(pre > 0, pre, _expm1(tl.where(pre > 0, 0.0, pre)))
    elif NAME == "sigmoid":
        y = tl.sigmoid(pre)
    elif NAME == "silu":
        y = pre * tl.sigmoid(pre)
    elif NAME == "sin":
        y = tl.sin(pre * PARAMETER)
    elif NAME == "tanh":
        y = _tanh(pre)
    elif NAME == "gelu":
        y = 0.5 * pre * (1 + tl.erf(pre * _HALF_ROOT))
    elif NAME == "gelu_tanh":
        y = 0.5 * pre * (1 + _tanh((pre + pre * pre * pre * _CUBE) * _ROOT))
    elif NAME == "softplus":
        y = tl.where(pre > 20, pre, _log1p(tl.exp(tl.where(pre > 20, 0.0, pre))))
    elif NAME == "abs":
        y = tl.abs(pre)
    elif NAME == "exp":
        y = tl.exp(pre)
    elif NAME == "square":
        y = pre * pre
    else:
        tl.static_assert(NAME == "identity")
    return y


@triton.jit
def slope(pre, NAME: tl.constexpr, PARAMETER: tl.constexpr):
    """The derivative of :func:`activate` at ``pre``."""
    y = pre
    if NAME == "relu":
        y = tl.where(pre <= 0, 0.0, 1.0).to(pre.dtype)
    elif NAME == "leaky_relu":
        y = tl.where(pre > 0, tl.full(pre.shape, 1.0, pre.dtype), PARAMETER)
    elif NAME == "elu":
        y = tl.exp(tl.where(pre > 0, 0.0, pre))
    elif NAME == "sigmoid":
        s = tl.sigmoid(pre)
        y = s * (1 - s)
    elif NAME == "silu":
        s = tl.sigmoid(pre)
        y = s * (1 + pre * (1 - s))
    elif NAME == "sin":
        y = PARAMETER * tl.cos(pre * PARAMETER)
    elif NAME == "tanh":
        t = _tanh(pre)
        y = 1 - t * t
    elif NAME == "gelu":
        y = 0.5 * (1 + tl.erf(pre * _HALF_ROOT)) + pre * _DENSITY * tl.exp(-0.5 * pre * pre)
    elif NAME == "gelu_tanh":
        t = _tanh((pre + pre * pre * pre * _CUBE) * _ROOT)
        y = 0.5 * (1 + t) + 0.5 * pre * (1 - t * t) * (1 + pre * pre * (3 * _CUBE)) * _ROOT
    elif NAME == "softplus":
        y = tl.where(pre > 20, 1.0, tl.sigmoid(pre)).to(pre.dtype)
    elif NAME == "abs":
        y = ((pre > 0).to(tl.int32) - (pre < 0).to(tl.int32)).to(pre.dtype)
    elif NAME == "exp":
        y = tl.exp(pre)
    elif NAME == "square":
        y = 2 * pre
    else:
        tl.static_assert(False)
    return y


class Finish(NamedTuple):
    """What a kernel does with its sums before it stores them.

    It applies the activation ``name``, and keeps its argument in ``pre`` where that is given; or,
    with ``slope``, it multiplies the sums by the derivative of the activation at ``pre``.
    """

    name: str = "identity"
    parameter: float = 1.0
    pre: Tensor | None = None
    slope: bool = False

    def backward(self, pre: Tensor) -> Finish:
        """Multiplies by the derivative at ``pre``; that of the identity is 1."""
        return self if self.name == "identity" else self._replace(pre=pre, slope=True)

    def at(self, rows: slice) -> Finish:
        """The same for some of the rows."""
        return self if self.pre is None else self._replace(pre=self.pre[rows])

    def by_torch(self, total: Tensor) -> Tensor:
        """The same for sums that a library made."""
        formula = KNOWN[self.name]
        if self.pre is not None and self.slope:
            return total * formula.slope(self.pre, self.parameter)
        if self.pre is not None:
            self.pre.copy_(total)
        return formula.value(total, self.parameter)

    def options(self) -> dict[str, Any]:
        return {
            "ACTIVATION": self.name,
            "PARAMETER": self.parameter,
            "KEEP": self.pre is not None and not self.slope,
            "SLOPE": self.slope,
        }


NOTHING = Finish()


@triton.jit
def finish(
    total, pre, at, mask,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, KEEP: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """:class:`Finish`, in a kernel: ``at`` is where the sums lie among the rows of ``pre``."""
    if SLOPE:
        return total * slope(tl.load(pre + at, mask, 0.0).to(total.dtype), ACTIVATION, PARAMETER)
    if KEEP:
        tl.store(pre + at, total.to(pre.dtype.element_ty), mask)
    return activate(total, ACTIVATION, PARAMETER)


def followed(network: Network) -> list[Finish]:
    """What follows each layer."""
    return [Finish(layer.activation, layer.parameter) for layer in network.layers]
