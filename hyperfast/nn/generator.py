"""What makes flat vectors of latents: trunks and heads, in one chain or one for every tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hyperfast import checks
from hyperfast.activations import second_moment
from hyperfast.nn.copies import clone


class Separate(nn.ModuleList):
    """A generator of its own, trunk and head, for every generated tensor; what they return, one
    behind another, is the flat vector."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([generator(z) for generator in self], -1)


def trunk_of(
    widths: Sequence[int], activations: Sequence[nn.Module], **kind: Any
) -> list[nn.Module]:
    """The modules of an MLP of these widths, activated after every layer."""
    modules: list[nn.Module] = []
    for (i, o), activation in zip(pairwise(widths), activations, strict=True):
        modules += [nn.Linear(i, o, **kind), activation]
    return modules


def modules_of(generator: nn.Module) -> list[nn.Module]:
    """The modules that one chain calls one after the other.

    Raises:
        TypeError: it is no ``nn.Sequential``.
    """
    if type(generator).forward is not nn.Sequential.forward or not generator._modules:
        raise TypeError(
            "hyper.generator must be an nn.Sequential of a trunk and a head, "
            f"got {type(generator).__name__}"
        )
    return list(generator._modules.values())  # type: ignore[arg-type]


def first_parameter(module: nn.Module) -> Tensor | None:
    """The first floating-point parameter that is stored; none is computed."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.is_floating_point():
            return parameter
    for child in module._modules.values():
        found = None if child is None else first_parameter(child)
        if found is not None:
            return found
    return None


def reset_all(module: nn.Module) -> None:
    """Calls ``reset_parameters`` of all modules inside that have it."""
    for part in module.modules():
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()


def start_trunk(modules: Sequence[nn.Module]) -> tuple[nn.Linear, float]:
    """Initialises a :func:`trunk_of`; returns the head behind it, and the second moment of features
    that enter this. Latents are taken to have variance 1.

    Raises:
        TypeError: these are not linear layers with weights of their own, and activations between.
    """
    *trunk, last = modules
    linears = [m for m in (*trunk[::2], last) if is_linear(m)]
    if len(linears) != len(trunk) // 2 + 1 or len(trunk) % 2:
        raise TypeError(
            "hyper.generator must be linear layers with weights of their own, and activations "
            f"between them, to be initialised, got {nn.Sequential(*modules)}"
        )
    head = linears.pop()
    moment = 1.0
    for linear, activation in zip(linears, trunk[1::2], strict=True):
        nn.init.normal_(linear.weight, std=(moment * linear.in_features) ** -0.5)  # type: ignore[arg-type, operator]
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
        moment = second_moment(activation, linear.out_features)  # type: ignore[arg-type]
    return head, moment  # type: ignore[return-value]


def given_trunk(modules: Sequence[nn.Module], width: int) -> tuple[nn.Linear, float]:
    """The head behind a trunk that was given, and the second moment of the features that a sample
    of ``width`` numbers has; 1 where there is none to be had.

    Raises:
        TypeError: the last module is no linear layer with a weight of its own.
    """
    *trunk, head = modules
    if not is_linear(head):
        raise TypeError(f"the head must be an nn.Linear to be initialised, got {head}")
    z, moment = _latents(head, 1024, width), math.nan
    if not z.is_meta:
        moment = float(_quietly(nn.Sequential(*trunk), z).double().square().mean())
    return head, moment if 0 < moment < math.inf else 1.0  # type: ignore[return-value]


@torch.no_grad()
def features_of(trunk: nn.Module, z_dim: int) -> int:
    """How many features a trunk makes of latents; lazy layers get their sizes.

    Raises:
        TypeError: it is no module.
        ValueError: it does not map ``(B, z_dim)`` to ``(B, H)``.
    """
    if not isinstance(trunk, nn.Module):
        raise TypeError(f"trunk must be a module, got {type(trunk).__name__}")
    try:
        h = _quietly(trunk, _latents(trunk, 2, z_dim))
    except RuntimeError as error:  # of a layer, to which the shapes do not say whose they are
        raise ValueError(f"trunk must map (2, {z_dim}) to (2, H), got {error}") from error
    if not isinstance(h, Tensor) or h.ndim != 2 or len(h) != 2:
        got = checks.shape(h) if isinstance(h, Tensor) else type(h).__name__
        raise ValueError(f"trunk must map (2, {z_dim}) to (2, H), got {got}")
    return h.shape[1]


def anew(trunk: nn.Module) -> nn.Module:
    """A copy, initialised anew."""
    copy = clone(trunk)
    reset_all(copy)
    return copy


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer with a weight of its own, none that is computed."""
    return isinstance(module, nn.Linear) and "weight" in module._parameters


def _latents(module: nn.Module, rows: int, z_dim: int) -> Tensor:
    """Standard normal latents of the dtype and on the device of a module."""
    first = first_parameter(module)
    z = torch.randn(rows, z_dim, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return z if first is None else z.to(first.device, first.dtype)


def _quietly(trunk: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """``trunk(z)`` as in evaluation: statistics of batches stay as they are."""
    assert isinstance(trunk, nn.Module)
    modes = [(module, module.training) for module in trunk.modules()]
    try:
        return trunk.eval()(z)
    finally:
        for module, mode in modes:
            module.training = mode
