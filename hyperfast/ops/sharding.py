"""How DTensor may cut the arguments of the ops, registered when the first DTensor comes: to import
it takes about a second.

Tasks are cut along their first dimension, and with them their rows; or, with ``task_ids``, the rows
alone. What is shared by all tasks is replicated, and its gradient is a sum over the ranks. An op
that takes the number of tasks as an argument is not told what is left of it on a rank: tasks are
not cut there. First derivatives only.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from hyperfast.ops.define import IDS, OPS, ROW, SHARED, TASK

_registered = False


def prepare(x: Tensor) -> None:
    """Registers the rules if ``x`` is a DTensor and they are not there yet."""
    global _registered
    module = sys.modules.get("torch.distributed.tensor")
    if not _registered and module is not None and isinstance(x, module.DTensor):
        _registered = True
        for name in OPS:
            _register(name)


def _register(name: str) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding
    from torch.distributed.tensor.placement_types import Partial

    inputs, outputs, counts_tasks = OPS[name]

    def rule(*args: Any) -> list[tuple[list[Any], list[Any]]]:
        ids = args[inputs.index(IDS)]
        given = [None if a is None else role for role, a in zip(inputs, args, strict=False)]
        rest = [None] * (len(args) - len(given))

        def placed(how: dict[str, Any], out: dict[str, Any]) -> tuple[list[Any], list[Any]]:
            chosen = [None if role is None else how[role] for role in given]
            return [out[role] for role in outputs], chosen + rest

        whole = dict.fromkeys((ROW, TASK, IDS, SHARED), Replicate())
        found = [placed(whole, whole)]
        cut = {ROW: Shard(0), TASK: Shard(0), SHARED: Replicate(), IDS: Shard(0)}
        if ids is not None:
            found.append(
                placed(cut | {TASK: Replicate()}, cut | {TASK: Partial(), SHARED: Partial()})
            )
        elif not counts_tasks:
            found.append(placed(cut, cut | {SHARED: Partial()}))
        return found

    register_sharding(getattr(torch.ops.hyperfast, name).default)(rule)
