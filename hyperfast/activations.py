"""Activations: the one table of those that kernels know, and any other module beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from hyperfast import checks

Activation: TypeAlias = str | nn.Module | Callable[[Tensor], Tensor]


class Sine(nn.Module):
    """``sin(w0 * x)``, the activation of SIREN (Sitzmann et al. 2020).

    A ``w0`` that is a Parameter is trained; its network then runs layer by layer.

    Example:
        >>> hyper = hyperfast.HyperNet(16, 2, (64, 64), 1, target_activation=hyperfast.Sine(30.0))
        >>> hyperfast.Sine(30.0)(torch.tensor(0.05))
        tensor(0.9975)
    """

    def __init__(self, w0: float | Tensor = 1.0):
        super().__init__()
        if not isinstance(w0, Real | Tensor):
            raise TypeError(f"w0 must be a number or a Tensor, got {w0!r}")
        self.w0 = float(w0) if isinstance(w0, Real) else w0

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


class Known(NamedTuple):
    """An activation that the kernels of every backend compute themselves.

    ``value`` and ``slope``, its derivative, take the pre-activation and the one number that
    ``parameter`` names among the attributes of ``module``; ``fixed`` says what other attributes
    must be.
    """

    module: type[nn.Module]
    value: Callable[[Tensor, float], Tensor]
    slope: Callable[[Tensor, float], Tensor]
    parameter: str = ""
    default: float = 1.0
    fixed: Mapping[str, Any] = {}

    def make(self, parameter: float | None = None) -> nn.Module:
        chosen = {} if parameter is None or not self.parameter else {self.parameter: parameter}
        return self.module(**self.fixed, **chosen)


def _silu_slope(pre: Tensor, _: float) -> Tensor:
    s = torch.sigmoid(pre)
    return s * (1 + pre * (1 - s))


def _gelu_slope(pre: Tensor, _: float) -> Tensor:
    density = torch.exp(-0.5 * pre * pre) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(pre * math.sqrt(0.5))) + pre * density


def _gelu_tanh_slope(pre: Tensor, _: float) -> Tensor:
    a, b = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(a * (pre + b * pre**3))
    return 0.5 * (1 + t) + 0.5 * pre * (1 - t * t) * a * (1 + 3 * b * pre * pre)


# A new one is a row here, one in csrc/isa/simd/activation.h and a branch in
# kernels/triton/activation.py; tests run over this table.
KNOWN: dict[str, Known] = {
    "identity": Known(nn.Identity, lambda pre, _: pre, lambda pre, _: torch.ones_like(pre)),
    "relu": Known(
        nn.ReLU, lambda pre, _: torch.relu(pre), lambda pre, _: (~(pre <= 0)).to(pre.dtype)
    ),
    "leaky_relu": Known(
        nn.LeakyReLU,
        F.leaky_relu,
        lambda pre, slope: torch.where(pre > 0, pre.new_ones(()), pre.new_full((), slope)),
        parameter="negative_slope",
        default=0.01,
    ),
    "elu": Known(
        nn.ELU,
        lambda pre, _: F.elu(pre),
        lambda pre, _: torch.exp(pre.clamp(max=0)),
        fixed={"alpha": 1.0},
    ),
    "gelu": Known(nn.GELU, lambda pre, _: F.gelu(pre), _gelu_slope, fixed={"approximate": "none"}),
    "gelu_tanh": Known(
        nn.GELU,
        lambda pre, _: F.gelu(pre, approximate="tanh"),
        _gelu_tanh_slope,
        fixed={"approximate": "tanh"},
    ),
    "sigmoid": Known(
        nn.Sigmoid,
        lambda pre, _: torch.sigmoid(pre),
        lambda pre, _: torch.sigmoid(pre) * torch.sigmoid(-pre),
    ),
    "silu": Known(nn.SiLU, lambda pre, _: F.silu(pre), _silu_slope),
    "sin": Known(
        Sine,
        lambda pre, w0: torch.sin(pre if w0 == 1 else w0 * pre),
        lambda pre, w0: w0 * torch.cos(pre if w0 == 1 else w0 * pre),
        parameter="w0",
    ),
    "softplus": Known(
        nn.Softplus,
        lambda pre, _: F.softplus(pre),
        lambda pre, _: torch.sigmoid(pre).where(pre <= 20, 1.0),
        fixed={"beta": 1.0, "threshold": 20.0},
    ),
    "tanh": Known(
        nn.Tanh, lambda pre, _: torch.tanh(pre), lambda pre, _: 1 - torch.tanh(pre).square()
    ),
}
_NAMES: dict[type[nn.Module], list[str]] = {}
for _name, _known in KNOWN.items():
    _NAMES.setdefault(_known.module, []).append(_name)
# As they are now: a class that is patched later computes something else.
_FORWARD = {kind: kind.forward for kind in _NAMES}

# Without parameters, elementwise and deterministic: these may see rows in any shape, and may stand
# between the layers of a plain stack.
ELEMENTWISE: tuple[type[nn.Module], ...] = (
    *_NAMES,
    *(nn.CELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LogSigmoid, nn.Mish),
    *(nn.ReLU6, nn.SELU, nn.Softshrink, nn.Softsign, nn.Tanhshrink, nn.Threshold),
)


def resolve(activation: Activation, name: str = "activation") -> nn.Module:
    """The module that computes ``activation``.

    Raises:
        ValueError: a name that is not in :data:`KNOWN`.
        TypeError: neither a name, nor a module, nor callable.
    """
    if isinstance(activation, str):
        if activation not in KNOWN:
            raise ValueError(f"{name} must be one of {sorted(KNOWN)}, got {activation!r}")
        return KNOWN[activation].make()
    if isinstance(activation, nn.Module):
        return activation
    module = getattr(activation, "__self__", None)  # of a method
    if isinstance(module, nn.Module) and activation in (module.forward, module.__call__):
        return module
    if callable(activation) and not isinstance(activation, type):
        return _Function(activation)
    raise TypeError(f"{name} must be a name, a module or a function, got {activation!r}")


def named(activation: nn.Module | None) -> tuple[str, float] | None:
    """Name and parameter of an activation in :data:`KNOWN`; ``None`` where it is not there, has
    tensors of its own, or does more than its class says."""
    if activation is None:
        return "identity", 1.0
    own, kind = activation.__dict__, type(activation)
    if _FORWARD.get(kind) is not kind.forward:
        return None
    for name in _NAMES[kind]:
        known = KNOWN[name]
        if known.fixed and any(own.get(key) != value for key, value in known.fixed.items()):
            continue
        if own["_parameters"] or own["_buffers"] or own["_modules"] or checks.is_hooked(activation):
            return None
        if not known.parameter:
            return name, 1.0
        parameter = own.get(known.parameter)
        if not isinstance(parameter, Real) or not math.isfinite(parameter):
            return None
        return name, float(parameter)
    return None


def activate(activation: nn.Module | None, x: Tensor) -> Tensor:
    """``activation`` of ``x (..., C)``, which it sees as it would in an ``nn.Sequential`` that runs
    on a batch of rows: as ``(R, C)``. So ``PReLU(C)`` has a slope a column, and ``Softmax(dim=1)``
    is taken over the columns.

    Raises:
        ValueError: it returns another shape.
    """
    if activation is None:
        return x
    if type(activation) in ELEMENTWISE and not checks.is_hooked(activation):
        return activation(x)
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    y = activation(rows)
    if not isinstance(y, Tensor):
        raise TypeError(f"{activation} must return a Tensor, got {type(y).__name__}")
    if y.shape != rows.shape:
        raise ValueError(
            f"{activation} must keep the shape of its rows, {checks.shape(rows)}, "
            f"got {checks.shape(y)}"
        )
    return y if x.ndim == 2 else y.reshape(x.shape)


def run_layers(
    x: Tensor,
    linears: Iterable[Callable[[Tensor], Tensor]],
    activations: Iterable[nn.Module | Callable[[Tensor], Tensor] | None],
    keep: list[Tensor] | None = None,
) -> Tensor:
    """A network layer by layer: each is linear, then activated. ``keep`` collects what enters the
    activations."""
    for linear, activation in zip(linears, activations, strict=True):
        x = linear(x)
        if keep is not None:
            keep.append(x)
        if activation is None or isinstance(activation, nn.Module):
            x = activate(activation, x)
        else:
            x = activation(x)
    return x


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
