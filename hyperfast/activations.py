"""Activations by name, by module or by function, and the moment that initialisation needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from hyperfast import checks

Activation: TypeAlias = str | nn.Module | Callable[[Tensor], Tensor]


class Sine(nn.Module):
    """``sin(w0 * x)``, the activation of SIREN (Sitzmann et al. 2020).

    A ``w0`` that is a Parameter is trained; its network then runs layer by layer.
    """

    def __init__(self, w0: float | Tensor = 1.0):
        super().__init__()
        self.w0 = float(w0) if isinstance(w0, int) else w0

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x if type(self.w0) is float and self.w0 == 1 else self.w0 * x)

    def extra_repr(self) -> str:
        return f"w0={self.w0}"


class _Function(nn.Module):
    """A plain function as a module, so that it can stand in an ``nn.Sequential``."""

    def __init__(self, fn: Callable[[Tensor], Tensor]):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)

    def extra_repr(self) -> str:
        return getattr(self.fn, "__name__", repr(self.fn))


# Without parameters, elementwise and deterministic: these may see rows in any shape, and may stand
# between the layers of a plain stack.
ELEMENTWISE = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh),
    *(nn.Identity, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU),
    *(nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold),
    Sine,
)


NAMES: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "identity": nn.Identity,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "sin": Sine,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def resolve(activation: Activation, name: str = "activation") -> nn.Module:
    """The module that computes ``activation``.

    Raises:
        ValueError: a name that is not in :data:`NAMES`.
        TypeError: neither a name, nor a module, nor callable.
    """
    if isinstance(activation, str):
        if activation not in NAMES:
            raise ValueError(f"{name} must be one of {sorted(NAMES)}, got {activation!r}")
        return NAMES[activation]()
    if isinstance(activation, nn.Module):
        return activation
    if callable(activation) and not isinstance(activation, type):
        return _Function(activation)
    raise TypeError(f"{name} must be a name, a module or a function, got {activation!r}")


def activate(activation: nn.Module | None, x: Tensor) -> Tensor:
    """``activation`` of ``x (..., C)``, which it sees as it would in an ``nn.Sequential`` that runs
    on a batch of rows: as ``(R, C)``. So ``PReLU(C)`` has a slope a column, and ``Softmax(dim=1)``
    is taken over the columns.

    Raises:
        ValueError: it returns another shape.
    """
    if activation is None:
        return x
    if x.ndim == 2 or (type(activation) in ELEMENTWISE and not checks.hooked(activation)):
        y = activation(x)
    else:
        y = activation(x.reshape(-1, x.shape[-1])).reshape(x.shape)
    if y.shape != x.shape:
        raise ValueError(
            f"{activation} must keep the shape of its rows, {checks.shape(x)}, "
            f"got {checks.shape(y)}"
        )
    return y


def second_moment(activation: nn.Module, width: int = 1) -> float:
    """``E[f(g)^2]`` for rows of ``width`` independent standard normals: 1/2 for ReLU, 1 for the
    identity.

    Its inverse is the squared gain that keeps the variance from layer to layer (He et al. 2015).
    Trapezoid rule on [-8, 8] for what acts on every element or column by itself, error below 1e-6
    for the named activations; for anything else the mean over a sample, error 0.5%. It is 1 where
    the activation cannot be asked: on the meta device, or where it does not take such rows.
    """
    state = dict(activation.named_parameters()) | dict(activation.named_buffers())
    if any(t.is_meta for t in state.values()):
        return 1.0
    by_column = type(activation) in ELEMENTWISE or type(activation) is nn.PReLU
    if by_column:
        g = torch.linspace(-8, 8, 4001, dtype=torch.float64, device="cpu")
        weight = torch.exp(-g * g / 2) * (16 / 4000 / math.sqrt(2 * math.pi))
        rows = g.unsqueeze(1).repeat(1, width)
    else:
        rows = torch.randn(
            max((1 << 18) // width, 64), width,
            generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float64, device="cpu",
        )  # fmt: skip
        weight = rows.new_full((len(rows),), 1 / len(rows))
    state = {
        name: t.detach().to("cpu", torch.float64 if t.is_floating_point() else t.dtype, copy=True)
        for name, t in state.items()
    }
    try:
        with torch.no_grad():
            values = functional_call(activation, state, (rows,))
        moment = float(weight @ values.square().mean(1))
    except Exception:  # of its own kind, whatever that is; it will come again in a forward pass
        return 1.0
    return moment if 0 < moment < math.inf else 1.0


class Formula(NamedTuple):
    """An activation that kernels compute themselves: its value and its derivative, from its
    argument and one parameter."""

    value: Callable[[Tensor, float], Tensor]
    slope: Callable[[Tensor, float], Tensor]


def _sigmoid_slope(z: Tensor, _: float) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s)


def _silu_slope(z: Tensor, _: float) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


# Kernels of every backend know these by name; the parameter is written behind a colon, "sin:30.0".
FORMULAS: dict[str, Formula] = {
    "identity": Formula(lambda z, _: z, lambda z, _: torch.ones_like(z)),
    "relu": Formula(lambda z, _: torch.relu(z), lambda z, _: (~(z <= 0)).to(z.dtype)),
    "leaky_relu": Formula(
        F.leaky_relu, lambda z, slope: torch.where(z > 0, z.new_ones(()), z.new_full((), slope))
    ),
    "elu": Formula(lambda z, _: F.elu(z), lambda z, _: torch.exp(z.clamp(max=0))),
    "sigmoid": Formula(lambda z, _: torch.sigmoid(z), _sigmoid_slope),
    "silu": Formula(lambda z, _: F.silu(z), _silu_slope),
    "sin": Formula(
        lambda z, w0: torch.sin(z if w0 == 1 else w0 * z),
        lambda z, w0: w0 * torch.cos(z if w0 == 1 else w0 * z),
    ),
    "tanh": Formula(lambda z, _: torch.tanh(z), lambda z, _: 1 - torch.tanh(z).square()),
}


_FORMULA_NAMES = {NAMES[name]: name for name in FORMULAS}


def encode(activations: Sequence[nn.Module | None]) -> str | None:
    """The activations after all layers of a network as the text that ops take, ``None`` where one
    of them is not known by name, or does more than its class says."""
    names = []
    for activation in activations:
        name: str | None = None
        if activation is None or type(activation) is nn.Identity:
            name = "identity"
        elif type(activation) is Sine:
            if not isinstance(activation.w0, int | float):
                return None
            name = f"sin:{float(activation.w0)!r}"
        elif type(activation) is nn.LeakyReLU:
            name = f"leaky_relu:{float(activation.negative_slope)!r}"
        elif type(activation) is not nn.ELU or activation.alpha == 1:
            name = _FORMULA_NAMES.get(type(activation))
        if name is None or (activation is not None and checks.hooked(activation)):
            return None
        names.append(name)
    return ",".join(names)


def decode(text: str) -> list[tuple[Formula, float]]:
    """The formula and the parameter of every activation in ``text``.

    Raises:
        ValueError: a name that is not in :data:`FORMULAS`, or a parameter that is no number.
    """
    decoded = []
    for entry in text.split(","):
        name, _, parameter = entry.partition(":")
        if name not in FORMULAS:
            raise ValueError(f"activations must be among {list(FORMULAS)}, got {entry!r}")
        try:
            decoded.append((FORMULAS[name], float(parameter or 1)))
        except ValueError:
            raise ValueError(f"activations must be names or name:number, got {entry!r}") from None
    return decoded
