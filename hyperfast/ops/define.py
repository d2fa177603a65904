"""How an op is registered: the only file that names ``torch.library``.

PyTorch's dispatcher is the registry. A backend registers its kernels for its device's key, and
where it has none the plans in plain PyTorch run. The C++ kernels register themselves when the
extension is loaded, the Triton kernels here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from hyperfast.plans import cpu
from hyperfast.plans.gpu import HAS_TRITON

assert cpu  # its import loads the extension

# What a tensor holds: an entry a row, an entry a task, the ids, or the same for all tasks.
ROW, TASK, IDS, SHARED = "row", "task", "ids", "shared"


class Roles(NamedTuple):
    """What the tensors of an op hold: those that it takes, which come first in its schema, and
    those that it returns; and whether the number of tasks is among its other arguments."""

    inputs: Sequence[str]
    outputs: Sequence[str]
    counts_tasks: bool


# All ops, in the order of their definition; and those that C++ kernels alone have.
OPS: dict[str, Roles] = {}
CPU_OPS: list[str] = []


def define(
    name: str,
    schema: str,
    roles: tuple[Sequence[str], Sequence[str]],
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
) -> Any:
    """Registers an op and returns it as the dispatcher knows it.

    Args:
        roles: of the tensors that it takes, and of those that it returns.
        kernel: runs where no backend has a kernel.
        fake: the output without its values.
    """
    qualified = f"hyperfast::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CompositeExplicitAutograd", kernel)
    if HAS_TRITON:
        torch.library.impl(qualified, "CUDA", _triton(name))
    torch.library.register_fake(qualified, fake)
    OPS[name] = Roles(*roles, "SymInt tasks" in schema)
    return getattr(torch.ops.hyperfast, name).default


def define_for_cpu(name: str, schema: str, fake: Callable[..., Any]) -> Any:
    """Registers an op of C++ kernels alone: whoever calls it has another way where they are not."""
    qualified = f"hyperfast::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(qualified, fake)
    CPU_OPS.append(name)
    return getattr(torch.ops.hyperfast, name).default


def differentiate(
    op: Any, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Gives an op its first derivative; how this is differentiated is its own affair."""
    torch.library.register_autograd(op, backward, setup_context=setup_context)


def vectorize(op: Any, rule: Callable[..., Any]) -> None:
    """Gives an op its rule for ``torch.vmap``."""
    torch.library.register_vmap(op, rule)


def count_flops(op: Any, formula: Callable[..., int]) -> None:
    """Tells ``FlopCounterMode`` what an op does, from the shapes of its arguments: multiply-adds
    of the specification, which makes the weights of each task once and applies them."""

    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return 2 * formula(*args)

    register_flop_formula(op.overloadpacket, get_raw=True)(flops)


def _triton(name: str) -> Callable[..., Any]:
    """The Triton kernel of an op; its module is imported at the first call."""

    def kernel(*args: Any) -> Any:
        from hyperfast.kernels import triton

        return getattr(triton, name)(*args)

    return kernel


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Within the context, the ops run their Triton kernels on CPU tensors: for Triton's
    interpreter, which is chosen by ``TRITON_INTERPRET=1`` before the first kernel is imported."""
    library = torch.library.Library("hyperfast", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden, which is the purpose
        for name in OPS:
            library.impl(name, _triton(name), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
