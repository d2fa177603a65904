"""What follows a layer, as :data:`hyperfast.activations.FORMULAS` says it, inside a kernel.

Sums are fp32 or fp64 here. NaN passes through each of them, as it does in PyTorch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from hyperfast.activations import FORMULAS


@triton.jit
def _expm1(z):
    """``exp(z) - 1``; near 0 by its series, whose next term is below 1e-18 of it."""
    series = z * (1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5 * (1 + z / 6 * (1 + z / 7))))))
    return tl.where(tl.abs(z) < 0.01, series, tl.exp(z) - 1)


@triton.jit
def _tanh(z):
    u = _expm1(-2 * tl.abs(z))
    t = -u / (2 + u)
    return tl.where(z < 0, -t, t)


@triton.jit
def activate(z, NAME: tl.constexpr, PARAMETER: tl.constexpr):
    tl.static_assert(
        NAME == "identity" or NAME == "relu" or NAME == "leaky_relu" or NAME == "elu"
        or NAME == "sigmoid" or NAME == "silu" or NAME == "sin" or NAME == "tanh"
    )  # fmt: skip
    if NAME == "relu":
        z = tl.where(z <= 0, 0.0, z)
    elif NAME == "leaky_relu":
        z = tl.where(z > 0, z, z * PARAMETER)
    elif NAME == "elu":
        z = tl.where(z > 0, z, _expm1(tl.where(z > 0, 0.0, z)))
    elif NAME == "sigmoid":
        z = tl.sigmoid(z)
    elif NAME == "silu":
        z = z * tl.sigmoid(z)
    elif NAME == "sin":
        z = tl.sin(z * PARAMETER)
    elif NAME == "tanh":
        z = _tanh(z)
    return z


@triton.jit
def slope(z, NAME: tl.constexpr, PARAMETER: tl.constexpr):
    """The derivative of :func:`activate` at ``z``."""
    tl.static_assert(
        NAME == "relu" or NAME == "leaky_relu" or NAME == "elu" or NAME == "sigmoid"
        or NAME == "silu" or NAME == "sin" or NAME == "tanh"
    )  # fmt: skip
    if NAME == "relu":
        z = tl.where(z <= 0, 0.0, 1.0).to(z.dtype)
    elif NAME == "leaky_relu":
        z = tl.where(z > 0, tl.full(z.shape, 1.0, z.dtype), PARAMETER)
    elif NAME == "elu":
        z = tl.exp(tl.where(z > 0, 0.0, z))
    elif NAME == "sigmoid":
        s = tl.sigmoid(z)
        z = s * (1 - s)
    elif NAME == "silu":
        s = tl.sigmoid(z)
        z = s * (1 + z * (1 - s))
    elif NAME == "sin":
        z = PARAMETER * tl.cos(z * PARAMETER)
    elif NAME == "tanh":
        t = _tanh(z)
        z = 1 - t * t
    return z


class Finish(NamedTuple):
    """What a kernel does with its sums before it stores them.

    It applies the activation ``name``, and keeps its argument in ``z`` where that is given; or,
    with ``slope``, it multiplies the sums by the derivative of the activation at ``z``.
    """

    name: str = "identity"
    parameter: float = 1.0
    z: Tensor | None = None
    slope: bool = False

    def backward(self, z: Tensor) -> Finish:
        """Multiplies by the derivative at ``z``; that of the identity is 1."""
        return self if self.name == "identity" else self._replace(z=z, slope=True)

    def at(self, rows: slice) -> Finish:
        """The same for some of the rows."""
        return self if self.z is None else self._replace(z=self.z[rows])

    def by_torch(self, total: Tensor) -> Tensor:
        """The same for sums that a library made."""
        formula = FORMULAS[self.name]
        if self.z is not None and self.slope:
            return total * formula.slope(self.z, self.parameter)
        if self.z is not None:
            self.z.copy_(total)
        return formula.value(total, self.parameter)

    def options(self) -> dict[str, Any]:
        return {
            "ACTIVATION": self.name,
            "PARAMETER": self.parameter,
            "KEEP": self.z is not None and not self.slope,
            "SLOPE": self.slope,
        }


NOTHING = Finish()


@triton.jit
def finish(
    total, z, at, mask,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, KEEP: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """:class:`Finish`, in a kernel: ``at`` is where the sums lie among the rows of ``z``."""
    if SLOPE:
        return total * slope(tl.load(z + at, mask, 0.0).to(total.dtype), ACTIVATION, PARAMETER)
    if KEEP:
        tl.store(z + at, total.to(z.dtype.element_ty), mask)
    return activate(total, ACTIVATION, PARAMETER)


def decoded(activations: str) -> list[Finish]:
    """What follows each layer, by the text that ops take."""
    entries = (entry.partition(":") for entry in activations.split(","))
    return [Finish(name, float(parameter or 1)) for name, _, parameter in entries]
