"""Checks of the arguments that users pass: one clear exception each, before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

Weights: TypeAlias = Iterable[Tensor] | Mapping[str, Tensor] | torch.nn.ParameterDict
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Types of what an op of C++ kernels alone takes: a subclass may have products of its own.
PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def check_tensor(name: str, value: object) -> Tensor:
    """``value`` if it is a Tensor; the message names it ``name``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    return value


def check_tensors(name: str, values: Weights) -> Sequence[Tensor]:
    """``values`` as a list or tuple, in their order: they may be an ``nn.ParameterList`` or a dict,
    as ``torch.func.stack_module_state`` returns it."""
    if isinstance(values, list | tuple):
        found: Sequence[Tensor] = values
    elif isinstance(values, Mapping | torch.nn.ParameterDict):
        found = list(values.values())
    elif isinstance(values, Iterable) and not isinstance(values, Tensor | str):
        found = list(values)
    else:
        came = f"one of shape {shape(values)}" if isinstance(values, Tensor) else repr(values)
        raise ValueError(f"{name} must be a non-empty sequence of tensors, got {came}")
    if not found:
        raise ValueError(f"{name} must be a non-empty sequence of tensors, got {values!r}")
    for n, value in enumerate(found):
        check_tensor(f"{name}[{n}]", value)
    return found


def check_dense(**tensors: Tensor | None) -> None:
    """Each has strides: it is neither nested nor sparse."""
    for name, t in tensors.items():
        if t is not None and (t.is_nested or t.layout != torch.strided):
            came = "a NestedTensor" if t.is_nested else f"layout {t.layout}"
            jagged = t.is_nested and name == "x"
            advice = "; give its rows, x.values(), and the task_ids of these" if jagged else ""
            raise TypeError(f"{name} must be a dense tensor, got {came}{advice}")


def check_same_kind(**tensors: Tensor | None) -> torch.dtype | None:
    """All are floating-point and on one device, and of one dtype or cast to one by autocast.

    ``bias`` may be ``None``. The names of the keywords are those of the message.

    Returns:
        the dtype that ``torch.autocast`` wants, ``None`` where it is off.
    """
    first: Tensor | None = None
    for name, t in tensors.items():
        if t is None and name == "bias":
            continue
        t = check_tensor(name, t)
        if not t.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {t.dtype}")
        if first is None:
            first_name, first, wanted = name, t, autocast_dtype(t.device.type)
            continue
        if t.device != first.device:
            raise ValueError(
                f"{name} must be on the device of {first_name}, {first.device}, got {t.device}"
            )
        # As in F.linear, autocast leaves fp64 alone.
        one = wanted is not None and torch.float64 not in (t.dtype, first.dtype)
        if t.dtype != first.dtype and not one:
            raise TypeError(
                f"{name} must have the dtype of {first_name}, {first.dtype}, got {t.dtype}"
            )
    return wanted


def check_like_weight(weight: Tensor, owner: str = "the hypernetwork", **tensors: Tensor) -> None:
    """:func:`check_same_kind` of the weight of a module and of each tensor, quick where they are:
    the message names the tensor, which the user gave."""
    for name, t in tensors.items():
        same = check_tensor(name, t).dtype is weight.dtype
        if not same or not ((t.is_cpu and weight.is_cpu) or t.device == weight.device):
            check_same_kind(**{f"{owner}'s weight": weight, name: t})


def is_plain(first: object, *others: object) -> bool:
    """Fast path (2 us): all of them (or, but for the first, ``None``) are dense, of one float
    dtype, on one device, with autocast off: :func:`check_operands` has nothing to say of them."""
    if not isinstance(first, Tensor) or first.dtype not in FLOATS:
        return False
    dtype, strided, on_cpu = first.dtype, torch.strided, first.is_cpu
    device = None if on_cpu else first.device  # asking for it takes as long as the rest
    for t in (first, *others):
        if t is not None and (
            not isinstance(t, Tensor)
            or t.dtype is not dtype
            or t.layout is not strided
            or t.is_nested
            or not (t.is_cpu if on_cpu else t.device == device)
        ):
            return False
    kind = "cpu" if device is None else device.type
    return kind in ("cpu", "cuda") and not torch.is_autocast_enabled(kind)


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward mode is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to on such devices, where it is on."""
    if not torch.amp.is_autocast_available(device):  # it is not for meta tensors
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def check_operands(**tensors: Tensor | None) -> torch.dtype | None:
    """:func:`check_same_kind` and :func:`check_dense`."""
    wanted = check_same_kind(**tensors)
    check_dense(**tensors)
    return wanted


def cast(wanted: torch.dtype | None, *tensors: Tensor | None) -> tuple:
    """The tensors in the dtype that :func:`check_same_kind` returned; fp64 stays as it is."""
    if wanted is None:
        return tensors
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(wanted) for t in tensors)


def check_and_cast(**tensors: Tensor | None) -> tuple:
    """The tensors as ``torch.autocast`` casts them where it is on, after :func:`check_operands`."""
    return cast(check_operands(**tensors), *tensors.values())


def is_hooked(*modules: torch.nn.Module) -> bool:
    """Whether a call of one of the modules does more or other than its class says."""
    if _has_any_global_hook():
        return True
    for module in modules:
        own = module.__dict__  # vars() takes 0.1 us more
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return True
    return False


def check_rows(x: Tensor, ins: int, tasks: int, ids: Tensor | None, source: str) -> None:
    """``x`` is ``(tasks, N, ins)`` or ``(tasks, ins)``; with ``ids (R,)`` it is ``(R, ins)``.

    ``source`` names the argument that says how many tasks there are. The values of ``ids`` are
    left to the kernels, because they are not known while a graph is traced.
    """
    if ids is None:
        if x.ndim not in (2, 3) or x.shape[0] != tasks or x.shape[-1] != ins:
            raise ValueError(
                f"x must have shape ({tasks}, N, {ins}) or ({tasks}, {ins}), as {source} holds "
                f"{tasks} tasks, or (R, {ins}) with task_ids, got {shape(x)}"
            )
        return
    if x.ndim != 2 or x.shape[-1] != ins:
        raise ValueError(f"x must have shape (R, {ins}) when task_ids is given, got {shape(x)}")
    if check_tensor("task_ids", ids).dtype != torch.int64:
        raise TypeError(f"task_ids must have dtype torch.int64, got {ids.dtype}")
    if ids.ndim != 1 or ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"task_ids must have shape ({x.shape[0]},), one id a row of x, got {shape(ids)}"
        )
    if ids.device != x.device:
        raise ValueError(f"task_ids must be on the device of x, {x.device}, got {ids.device}")


def check_rows_match(
    rows: list[Tensor], per_task: list[Tensor], tasks: int, ids: Tensor | None
) -> None:
    """The arguments of a kernel speak of the same rows and tasks, so that each is read in bounds
    and each element of the result is written.

    Raises:
        ValueError: they do not.
    """
    lead = shape(rows[0])[:-1]
    wanted = shape(ids) if ids is not None else (tasks, *lead[1:2])
    if (
        tasks < 0
        or len(lead) != (1 if ids is not None else 2)
        or any(shape(t)[:-1] != wanted for t in rows)
        or any(shape(t)[:1] != (tasks,) for t in per_task)
    ):
        raise ValueError(
            f"rows, tasks and task_ids must agree, got rows of shapes {[*map(shape, rows)]}, "
            f"{tasks} tasks of shapes {[*map(shape, per_task)]}, and task_ids of shape "
            f"{None if ids is None else shape(ids)}"
        )


def has_data(t: Tensor) -> bool:
    """Whether it is neither on the meta device nor fake."""
    return not t.is_meta and not isinstance(t, FakeTensor)


def check_in_range_if_known(ids: Tensor, tasks: int, name: str) -> None:
    """:func:`check_in_range` where there are values to read: not while a graph is traced, not of
    tensors without data, and not under transforms of ``torch.func``."""
    if (
        not torch.compiler.is_compiling()
        and has_data(ids)
        and not torch._C._functorch.is_functorch_wrapped_tensor(ids)
    ):
        check_in_range(ids, tasks, name)


def check_in_range(ids: Tensor | None, tasks: int, name: str = "task_ids") -> None:
    """Every id lies in ``[0, tasks)``. Reads the values: for kernels, not for traced code.

    Raises:
        IndexError: one does not.
    """
    if ids is None or ids.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(ids))
    if low < 0 or high >= tasks:
        raise IndexError(f"{name} must be in [0, {tasks}), got {low if low < 0 else high}")
