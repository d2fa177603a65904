"""Copies of modules, for owners that must not share what they own."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def clone(module: Module) -> Module:
    """A deep copy, also of a module that keeps computed weights beside its parameters (pruned, or
    normalised by a hook), which PyTorch does not copy. The hooks compute them again."""
    memo: dict[int, object] = {}
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


def apart(modules: Iterable[Module], *owners: nn.Module) -> list[Module]:
    """The modules, with a copy in place of each that shares a parameter or buffer with one before
    it or with one of ``owners``: so each is trained, saved and loaded under one name."""
    taken = {id(t) for owner in owners for t in _tensors(owner)}
    result = []
    for module in modules:
        if not taken.isdisjoint(map(id, _tensors(module))):
            module = clone(module)
        taken.update(map(id, _tensors(module)))
        result.append(module)
    return result


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
