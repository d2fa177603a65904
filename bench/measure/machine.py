"""What a number depends on besides the code: processor, versions, threads, commit, day."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

ISA_FLAGS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl",
    "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16",
)  # fmt: skip
WIDEST = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve")

PACKAGES = (
    "torch", "jax", "jaxlib", "numpy", "hypnettorch", "hyperlight", "hyper-nn",
    "torch-geometric", "torchrl", "evotorch", "peft",
)  # fmt: skip


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_threads(threads: int) -> None:
    """For every library alike. JAX takes its number of threads from the cores that the process may
    use, once, at import."""
    import torch

    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity") and threads < cores():
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def machine() -> dict[str, object]:
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        text = ""
    info = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in text.splitlines())}
    flags = set(info.get("flags", info.get("Features", "")).split())
    identity = (
        info.get("model name") or platform.processor() or platform.machine(),
        f"family {info['cpu family']} model {info['model']}" if "cpu family" in info else "",
    )
    return {
        "cpu": " ".join(part for part in identity if part),
        "cores": os.cpu_count(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "system": f"{platform.system()} {platform.machine()}",
    }


def machine_key(machine: dict[str, Any], threads: int) -> str:
    """A file name: the processor, the widest instruction set that it shows (a virtual machine may
    hide some), its cores, the threads used."""
    isa = next((flag for flag in WIDEST if flag in machine["isa"]), "")
    name = re.sub(r"[^a-z0-9]+", "-", f"{machine['cpu']} {isa}".lower()).strip("-")
    return f"{name}-{machine['cores']}c-{threads}t"


def versions() -> dict[str, str]:
    """Installed ones only; an absent package is told as such by its rival."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checkout's commit, marked when the tree differs from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        # Results are written into the tree: they do not change what was measured.
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", ".", ":!bench/results"],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def circumstances(threads: int) -> dict[str, object]:
    """What every results file says of its run."""
    return {
        "date": today(),
        "commit": commit(),
        "threads": threads,
        "machine": machine(),
        "versions": versions(),
    }
