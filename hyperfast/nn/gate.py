"""The gate of the fused path: whether every part is exactly what the op computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from hyperfast import checks
from hyperfast.activations import ELEMENTWISE, named
from hyperfast.layout import MLPSpec, Trunk
from hyperfast.nn.chunked import Chunked
from hyperfast.nn.generator import Separate
from hyperfast.nn.hypernet import HyperNet
from hyperfast.nn.target import TargetNet

IDENTITY = "identity", 1.0

# As they are now: a class that is patched later does something else.
_KNOWN: list[type[nn.Module]] = [nn.Linear, nn.Sequential, nn.Unflatten, *ELEMENTWISE]
_KNOWN += Chunked, HyperNet, TargetNet
FORWARD: dict[type[nn.Module], Callable] = {kind: kind.forward for kind in _KNOWN}


class Fused(NamedTuple):
    """What is generated and applied without forming the weights.

    Attributes:
        spec, target: of the model.
        trunks, heads: one of each, or one for every generated tensor. A trunk is a chain of
            modules.
        transform: of all matrices, ``""`` for none.
        whole: whether the network may run as one op: one head makes the weights, one after another,
            or what becomes them by the transform.
    """

    spec: MLPSpec
    target: TargetNet
    trunks: list[list[nn.Module]]
    heads: list[nn.Linear]
    transform: str
    whole: bool


def fused(hyper: HyperNet, target: nn.Module) -> Fused | None:
    """The parts of ``target(x, hyper(z))`` where layers may be generated and applied at once, else
    ``None``: then it runs as it is written.

    The hypernetwork must be a plain ``nn.Sequential`` that ends in a plain ``nn.Linear``, or one of
    these for every generated tensor. Its trunk is called, module by module, and may hold anything.
    The target must be a :class:`TargetNet`; of its activations, those that kernels know run inside
    the op, and any other is called between layers. A transform must be known by name, and be that
    of what is generated.
    """
    spec = hyper.spec
    generator: Any = hyper._modules["generator"]
    if not isinstance(target, TargetNet) or type(spec) is not MLPSpec:
        return None
    transform, separate = hyper.transform, type(generator) is Separate
    if target.weight_transform is not None:
        if transform is not None or hyper.rank is not None or hyper.base is not None:
            return None
        transform = target.weight_transform
    if transform is not None and not isinstance(transform, str):
        return None
    if (
        not _runs(hyper, HyperNet)
        or not _runs(target, TargetNet)
        or checks.is_hooked(hyper, generator, target)
    ):
        return None
    parts = [trunk_and_head(c) for c in (generator if separate else [generator])]
    trunks, heads = [], []
    for part in parts:
        if part is None:
            return None
        trunks.append(part[0])
        heads.append(part[1])
    added = hyper.base is not None and transform is not None
    whole = not separate and not added and hyper.rank is None and hyper.biases is None
    return Fused(spec, target, trunks, heads, transform or "", whole)


def in_parts(hyper: HyperNet, target: nn.Module) -> bool:
    """Whether ``target(x, hyper(z))`` is a network of chunked weights that may as well run for some
    tasks, or some outputs of a layer, at a time, and again in the backward pass: no part of it sees
    rows of others, draws at random, or keeps anything from call to call.
    """
    made: Any = hyper._modules["generator"]
    return (
        type(hyper) is HyperNet
        and type(made) is Chunked
        and type(target) is TargetNet
        and type(hyper.spec) is MLPSpec
        and isinstance(target.weight_transform, str | None)
        and all(_runs(module, type(module)) for module in (hyper, made, target))
        and not checks.is_hooked(hyper, made, target)
        and _owns(hyper, "base")
        and _owns(made, "embeddings", "scale", "offset")
        and all(map(_is_plain, (made.trunk, *made.heads)))
        and all(any(type(m) is nn.Linear for m in head.modules()) for head in made.heads)
        and all(map(_is_elementwise, target.activations))
    )


def _is_plain(module: nn.Module) -> bool:
    """Whether it calls linear layers and elementwise activations one after the other, and no
    more."""
    if type(module) is nn.Sequential:
        plain = _runs(module, nn.Sequential) and not checks.is_hooked(module)
        return plain and all(map(_is_plain, module.children()))
    if type(module) is nn.Linear:
        return is_plain_linear(module) and _owns(module, "weight", "bias")
    return _is_elementwise(module)


def _is_elementwise(module: nn.Module) -> bool:
    """Whether it is an elementwise activation, or divides a dimension, without tensors."""
    kind, own = type(module), vars(module)
    return (
        (kind in ELEMENTWISE or kind is nn.Unflatten)
        and _runs(module, kind)
        and not checks.is_hooked(module)
        and not (own["_parameters"] or own["_buffers"] or own["_modules"])
        and not any(isinstance(value, Tensor) for value in own.values())  # a w0 of Sine
    )


def _owns(module: nn.Module, *names: str) -> bool:
    """Whether these are parameters of the module, dense and of PyTorch's own type, or ``None``; not
    attributes and buffers, as replicas and what is learned in an inner loop have them."""
    for name in names:
        t = getattr(module, name)
        if t is not module._parameters.get(name):
            return False
        if t is not None and (type(t) not in (nn.Parameter, Tensor) or t.layout != torch.strided):
            return False
    return True


def trunk_and_head(module: nn.Module) -> tuple[list[Any], nn.Linear] | None:
    """What a plain ``nn.Sequential`` calls one after the other, if it ends in a plain
    ``nn.Linear``."""
    # Pruning and adapters are hooks or other types, parametrised and quantised layers are other
    # types, quantised tensors are subclasses from elsewhere.
    if (
        type(module) is not nn.Sequential
        or not module._modules
        or not _runs(module, nn.Sequential)
        or checks.is_hooked(module)
    ):
        return None
    *trunk, head = module._modules.values()
    return (trunk, head) if is_plain_linear(head) else None


def plain_trunk(modules: Sequence[nn.Module], z_dim: int) -> Trunk | None:
    """What ``modules``, called one after the other on ``z (B, z_dim)``, compute, if they are plain
    linear layers whose sizes fit, each followed by one known activation or none."""
    sizes = [z_dim]
    tensors: list[Tensor] = []
    biases: list[bool] = []
    names: list[tuple[str, float]] = []
    for module in modules:
        if is_plain_linear(module):
            weight, bias = weight_and_bias(module)
            if type(weight) not in checks.PLAIN or weight.ndim != 2:
                return None
            out, ins = weight.shape
            if ins != sizes[-1]:
                return None
            sizes.append(out)
            tensors.append(weight)
            biases.append(bias is not None)
            names.append(IDENTITY)
            if bias is not None:
                if type(bias) not in checks.PLAIN or bias.shape != (out,):
                    return None
                tensors.append(bias)
        else:
            name = named(module)
            if name is None or not names or names[-1] is not IDENTITY:
                return None
            names[-1] = name
    return Trunk.of(tensors, sizes, biases, names) if tensors else None


def is_plain_linear(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether a call of ``module`` is ``F.linear`` with its weight and bias, and no more."""
    return (
        module is not None
        and type(module) is nn.Linear
        and _runs(module, nn.Linear)
        and not checks.is_hooked(module)
        and all(map(_is_torch, weight_and_bias(module)))
    )


def weight_and_bias(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """What a call of ``layer`` reads, which is no parameter where it was put in the place of one,
    as in a replica of ``nn.DataParallel``."""
    own: Any = layer._parameters  # an attribute of a module takes 1 us
    if "weight" in own and "bias" in own:
        return own["weight"], own["bias"]
    return layer.weight, layer.bias


def _runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of ``module``, hooks apart, runs the forward that this library knows."""
    cls = type(module)
    return cls.forward is FORWARD[kind] and cls.__call__ is nn.Module.__call__


def _is_torch(t: Tensor | None) -> bool:
    """Whether the product with ``t`` is PyTorch's own."""
    cls = type(t)
    return cls is nn.Parameter or t is None or cls.__module__.split(".")[0] == "torch"
