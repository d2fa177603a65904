"""The gate of the fused path: whether every part is exactly what the op computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from hyperfast import checks
from hyperfast.layout import MLPSpec
from hyperfast.nn.hypernet import HyperNet
from hyperfast.nn.target import TargetNet

# As they are now: a class that is patched later does something else.
FORWARD: dict[type[nn.Module], Callable] = {
    kind: kind.forward for kind in (nn.Linear, nn.Sequential, HyperNet, TargetNet)
}


class Fused(NamedTuple):
    """What is generated and applied without forming the weights."""

    spec: MLPSpec
    target: TargetNet
    head: nn.Linear
    trunk: list[nn.Module]


def fused(hyper: HyperNet, target: nn.Module) -> Fused | None:
    """The parts of ``target(x, hyper(z))`` where layers may be generated and applied at once, else
    ``None``: then it runs as it is written.

    The hypernetwork must be a plain ``nn.Sequential`` that ends in a plain ``nn.Linear``. Its
    trunk is called, module by module, and may hold anything. The target must be a
    :class:`TargetNet` without transform; of its activations, those that kernels know run inside
    the op, and any other is called between layers.
    """
    generator, spec = hyper.generator, hyper.spec
    if (
        not isinstance(target, TargetNet)
        or type(spec) is not MLPSpec
        or target.weight_transform is not None
        or type(generator) is not nn.Sequential
        or not generator._modules
    ):
        return None
    *trunk, head = generator._modules.values()
    # Pruning and adapters are hooks or other types, parametrised and quantised layers are other
    # types, quantised tensors are subclasses from elsewhere.
    if (
        type(head) is not nn.Linear
        or not _runs(head, nn.Linear)
        or not _runs(generator, nn.Sequential)
        or not _runs(hyper, HyperNet)
        or not _runs(target, TargetNet)
        or checks.is_hooked(hyper, generator, head, target)
        or not all(map(_is_torch, head._parameters.values()))
    ):
        return None
    return Fused(spec, target, head, trunk)


def _runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of ``module``, hooks apart, runs the forward that this library knows."""
    cls = type(module)
    return cls.forward is FORWARD[kind] and cls.__call__ is nn.Module.__call__


def _is_torch(t: Tensor | None) -> bool:
    """Whether the product with ``t`` is PyTorch's own."""
    cls = type(t)
    return cls is nn.Parameter or t is None or cls.__module__.split(".")[0] == "torch"
