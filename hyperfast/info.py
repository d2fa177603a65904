"""``python -m hyperfast info``: versions, devices, what is built, and what runs for what."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

import hyperfast
from hyperfast.ops.backends import KEYS, has_kernel, why_missing
from hyperfast.ops.define import CPU_OPS, OPS
from hyperfast.plans.cpu import EXTENSION
from hyperfast.plans.gpu import HAS_TRITON

# Earlier ptxas overwrites registers that a warpgroup's product on a Hopper still reads:
# https://github.com/triton-lang/triton/issues/9433.
HOPPER, RIGHT = (9, 0), (13, 3)


def report() -> str:
    """The whole text."""
    devices = [*_devices(), *_assemblers(_capabilities())]
    return "\n".join([*_versions(), "", *devices, "", *_backends(), "", *_choices()])


def _versions() -> list[str]:
    lines = [f"hyperfast    {hyperfast.__version__}", f"python       {sys.version.split()[0]}"]
    for package in ("torch", "triton", "safetensors"):
        try:
            lines.append(f"{package:<12} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package:<12} not installed")
    return lines


def _devices() -> list[str]:
    isa = torch.backends.cpu.get_cpu_capability()
    lines = [
        f"cpu          {platform.machine()}, torch uses {isa}, {torch.get_num_threads()} threads"
    ]
    if not torch.cuda.is_available():
        return [*lines, "cuda         none"]
    for n in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(n)
        lines.append(
            f"cuda:{n}       {p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}"
        )
    return lines


def _capabilities() -> list[tuple[int, int]]:
    """Of NVIDIA's devices, which Triton assembles for."""
    if torch.version.hip or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(n) for n in range(torch.cuda.device_count())]


class Assembler(NamedTuple):
    """A ptxas: where it is, and of which release."""

    path: str
    release: tuple[int, ...]

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.release))}, {self.path}"

    def errs_on(self, capability: tuple[int, int]) -> bool:
        """Whether what it makes for such a device may be wrong."""
        return capability == HOPPER and self.release < RIGHT


def assembler(capability: tuple[int, int] = HOPPER) -> Assembler:
    """The one with which Triton would assemble kernels for such a device: what TRITON_PTXAS_PATH,
    or from sm_100 on TRITON_PTXAS_BLACKWELL_PATH, names, or its own.

    Raises:
        RuntimeError: there is none.
    """
    import triton

    tools = triton.knobs.nvidia
    tool = tools.ptxas_blackwell if capability >= (10, 0) else tools.ptxas
    return Assembler(tool.path, tuple(map(int, tool.version.split("."))))


def _assemblers(capabilities: Sequence[tuple[int, int]]) -> list[str]:
    """For each of these kinds of device, or where there is none for a Hopper."""
    if not HAS_TRITON or torch.version.hip:  # ROCm has an assembler of its own
        return []
    lines = []
    for capability in sorted(set(capabilities)) or [HOPPER]:
        try:
            tool = assembler(capability)
        except RuntimeError as error:
            lines.append(f"ptxas        {error}")
            continue
        lines.append(f"ptxas        {tool}")
        if capability in capabilities and tool.errs_on(capability):
            lines.append(
                "             warning: before release 13.3 it miscompiles products on sm_90 "
                "(triton issue 9433); let TRITON_PTXAS_PATH name a later one, as the package "
                "nvidia-cuda-nvcc has"
            )
    return list(dict.fromkeys(lines))


def _backends() -> list[str]:
    lines = ["reference    built in"]
    for backend in KEYS:
        reason = why_missing(backend)
        lines.append(
            f"{backend:<12} {'missing: ' + reason if reason else 'built' + _detail(backend)}"
        )
    return lines


def _detail(backend: str) -> str:
    if backend == "triton":
        from hyperfast.kernels.triton import direct

        if direct.WHY_NOT:
            return f", launches by Triton's own way: {direct.WHY_NOT}"
        return ", launches what it has compiled directly"
    if backend != "cpp" or EXTENSION is None:
        return ""
    reason = _cannot_run()
    return f", but cannot run: {reason}" if reason else f", kernels for {EXTENSION.isa()}"


def _cannot_run() -> str:
    """Why the C++ kernels, which are loaded, raise: HYPERFAST_ISA names what is not here."""
    try:
        if EXTENSION is not None:
            EXTENSION.isa()
    except ValueError as error:
        return str(error)
    return ""


def _choices() -> list[str]:
    """For each op and device, the backend that the dispatcher runs."""
    lines = [f"{'op':<26} {'CPU tensors':<16} CUDA tensors"]
    for op in (*OPS, *CPU_OPS):
        cpu, cuda = (
            backend if has_kernel(backend, op) else "plain PyTorch" for backend in ("cpp", "triton")
        )
        raises = cpu == "cpp" and _cannot_run()
        lines.append(f"{op:<26} {'raises' if raises else cpu:<16} {cuda}")
    return lines
