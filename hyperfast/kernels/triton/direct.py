"""Kernels that are compiled already, launched past Triton's own look-up of them.

Triton binds and classifies the arguments of every launch in Python: of 32 arguments and 25
constants that takes the host 21 us, 7 us of them for what is done here (bench/gpu/README.md). A key
of all that Triton compiles a kernel for finds what it returned at the first launch of that kind,
which is called as Triton would call it. To compile, to load, and what can fail there stay Triton's.

A key holds the device, every constant and option, and of the arguments what Triton sees: of a
pointer its dtype and whether it is a multiple of 16; of a number whether it is 1, whether it is a
multiple of 16, and how wide it is. It may tell apart what is the same for Triton, never the
reverse. Triton also asks whether global constants have changed: those of our kernels never do.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel

INTERPRETED = triton.knobs.runtime.interpret
VERSIONS = (3, 6), (3, 7)  # that were read: what they compile for, how they call it
KNOBS = "debug", "launch_enter_hook", "launch_exit_hook", "add_stages_inspection_hook"


def _why_not() -> str:
    knobs = triton.knobs
    if os.environ.get("HYPERFAST_DIRECT_LAUNCH") == "0":
        return "HYPERFAST_DIRECT_LAUNCH=0"
    if INTERPRETED:
        return "TRITON_INTERPRET=1"
    if torch.version.hip:
        return "for ROCm a kernel depends on the size of a tensor's memory, too"
    if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) not in VERSIONS:
        return f"Triton {triton.__version__} is none of those that are known"
    lacking = [name for name in KNOBS if not hasattr(knobs.runtime, name)]
    if lacking or not hasattr(knobs.compilation, "instrumentation_mode"):
        return f"Triton {triton.__version__} is not as it is known"
    return ""


# Why every launch is Triton's own; empty where it is not.
WHY_NOT = _why_not()

# A kernel's function -> how many of its arguments are pointers, and key -> what was compiled, with
# the constants that come after the arguments.
Made = dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]]
made: dict[Any, tuple[int, Made]] = {}


def launch(kernel: Any, programs: int, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """``kernel[(programs,)](*args, **named)`` on the device of the first argument and its current
    stream. Pointers, which may be None, come before numbers, which are ints and no bools."""
    if INTERPRETED:
        kernel[(programs,)](*args, **named)
        return
    driver, device = triton.runtime.driver.active, args[0].device
    if device.index == driver.get_current_device():
        _launch(driver, device.index, kernel, programs, args, named)
    else:
        with torch.cuda.device(device):
            _launch(driver, device.index, kernel, programs, args, named)


def _launch(
    driver: Any,
    device: int,
    kernel: Any,
    programs: int,
    args: tuple[Any, ...],
    named: dict[str, Any],
) -> None:
    if WHY_NOT or _observed(kernel):
        kernel[(programs,)](*args, **named)
        return
    if (known := made.get(kernel.fn)) is None:
        known = made[kernel.fn] = sum(not isinstance(a, int) for a in args), {}
    key = _key(device, args, known[0], named)
    if found := known[1].get(key):
        compiled, constants = found
        # Nobody listens: None for what hooks would be told, and for the hooks.
        compiled.run(
            programs, 1, 1, driver.get_current_stream(device), compiled.function,
            compiled.packed_metadata, None, None, None, *args, *constants,
        )  # fmt: skip
        return
    compiled = kernel[(programs,)](*args, **named)
    if isinstance(compiled, CompiledKernel):  # a hook may have kept Triton from compiling
        known[1][key] = compiled, tuple(named[name] for name in kernel.arg_names[len(args) :])


def _key(device: int, args: tuple[Any, ...], pointers: int, named: dict[str, Any]) -> tuple:
    return (
        device,
        *named,
        *named.values(),
        *[
            None if p is None else p.dtype if p.data_ptr() & 15 == 0 else (p.dtype,)
            for p in args[:pointers]
        ],
        *[n if n < 2 else 2 + (n.bit_length() & 96) + (n & 15 == 0) for n in args[pointers:]],
    )


def _observed(kernel: Any) -> bool:
    """Whether somebody listens to launches, or takes part in compiling."""
    knobs = triton.knobs.runtime
    return bool(
        getattr(knobs.launch_enter_hook, "calls", knobs.launch_enter_hook)
        or getattr(knobs.launch_exit_hook, "calls", knobs.launch_exit_hook)
        or knobs.debug
        or knobs.add_stages_inspection_hook
        or triton.knobs.compilation.instrumentation_mode
        or kernel.pre_run_hooks
    )
