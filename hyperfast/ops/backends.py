"""Which backend runs: what is there, why not, and how to insist on one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from hyperfast import checks
from hyperfast.ops.define import OPS, triton_on_cpu
from hyperfast.plans.cpu import EXTENSION, EXTENSION_ERROR
from hyperfast.plans.gpu import HAS_TRITON

# A backend registers its kernels for a dispatch key; the reference needs none.
KEYS = {"cpp": "CPU", "triton": "CUDA"}
BACKENDS = ("reference", *KEYS)

forced: str | None = None


def has_kernel(backend: str, op: str) -> bool:
    """Whether ``backend`` has registered a kernel for the op named ``op``."""
    key = KEYS.get(backend)
    return key is None or torch._C._dispatch_has_kernel_for_dispatch_key(f"hyperfast::{op}", key)


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_missing(backend: str) -> str:
    """Why ``backend`` cannot be used here; empty where it can."""
    if backend == "triton":
        if not HAS_TRITON:
            return "the package triton is not installed"
        if not torch.cuda.is_available() and not interpreting():
            return "torch sees no CUDA device, nor is TRITON_INTERPRET=1 set to run on the CPU"
        return ""
    if backend == "cpp" and not any(has_kernel(backend, op) for op in OPS):
        return f"the C++ extension is not loaded: {EXTENSION_ERROR}"
    return ""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context, layers run on the named backend or raise.

    ``"reference"`` runs the specification in plain PyTorch, differentiated by PyTorch itself.
    ``"cpp"`` and ``"triton"`` insist on a kernel that is otherwise chosen where there is one; with
    ``TRITON_INTERPRET=1`` in the environment, ``"triton"`` runs on the CPU, very slowly. The choice
    holds for the whole process, like the flags of ``torch.backends``, and a compiled graph keeps
    the one that it was traced with.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend is not there; the message says why.

    Example:
        >>> model = hyperfast.HyperMLP(hyperfast.HyperNet(16, 2, 32, 1))
        >>> with hyperfast.use_backend("reference"):
        ...     model(torch.rand(9, 2), torch.randn(9, 16)).shape
        torch.Size([9, 1])
    """
    global forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, got {name!r}")
    if reason := why_missing(name):
        raise RuntimeError(f"backend {name!r} is not there: {reason}")
    before, forced = forced, name
    try:
        with triton_on_cpu() if name == "triton" and interpreting() else nullcontext():
            yield
    finally:
        forced = before


def insist(backend: str, op: str, device: str) -> None:
    """Raises RuntimeError unless ``backend`` has a kernel of ``op`` for tensors on ``device``."""
    interpreted = backend == "triton" and device == "cpu" and interpreting()
    if not interpreted and (KEYS[backend].lower() != device or not has_kernel(backend, op)):
        raise RuntimeError(f"backend {backend!r} has no kernel of {op} for {device} tensors")


def fit_for_cpu(given: Sequence[Tensor | None]) -> bool:
    """Whether an op of C++ kernels alone takes such tensors: plain ones in float32 or float64."""
    first = given[0]
    return (
        first is not None
        and first.device.type == "cpu"
        and first.dtype in (torch.float32, torch.float64)
        and checks.PLAIN.issuperset(map(type, given))
        and checks.is_plain(*given)
    )


def runs_cpu_op(given: Sequence[Tensor | None]) -> bool:
    """Whether an op of C++ kernels alone, and the Function around it, run on such tensors here and
    now; layers that are ops for every device are the other way."""
    return (
        not (torch.compiler.is_compiling() or checks.is_transformed())
        and not torch._C._get_tracing_state()  # a trace holds ops, and no Function of Python
        and forced in (None, "cpp")
        and EXTENSION is not None
        and fit_for_cpu(given)
    )
