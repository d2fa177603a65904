"""``python -m hyperfast info``: versions, devices, what is built, and what runs for what."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

import hyperfast
from hyperfast.ops.backends import KEYS, has_kernel, why_missing
from hyperfast.ops.define import CPU_OPS, OPS
from hyperfast.plans.cpu import EXTENSION


def report() -> str:
    """The whole text."""
    return "\n".join([*_versions(), "", *_devices(), "", *_backends(), "", *_choices()])


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


def _backends() -> list[str]:
    lines = ["reference    built in"]
    for backend in KEYS:
        reason = why_missing(backend)
        lines.append(
            f"{backend:<12} {'missing: ' + reason if reason else 'built' + _detail(backend)}"
        )
    return lines


def _detail(backend: str) -> str:
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
