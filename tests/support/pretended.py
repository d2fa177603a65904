"""Devices that are not there: what Triton asks of one, and a compiler that compiles nothing. What
would have been launched is recorded. ``python -m tests.support.pretended`` prints what the Python
of a launch takes, by Triton and past it.
"""

import sys
import time
from contextlib import contextmanager
from itertools import count
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from hyperfast.kernels.triton import direct
from tests.support.launches import instead, run_kind


class Launched(NamedTuple):
    """One call of what was compiled: all that a launch is made of."""

    compiled: CompiledKernel
    grid: tuple
    stream: int
    function: int
    metadata: Any
    observers: tuple  # what hooks are told, and hooks: all None where nobody listens
    args: tuple

    @property
    def direct(self):
        return self.observers == (None, None, None)

    def same(self, other):
        """Whether the device would run the same."""
        return (
            self.compiled is other.compiled
            and self[1:5] == other[1:5]
            and len(self.args) == len(other.args)
            and all(a is b or a == b for a, b in zip(self.args, other.args, strict=True))
        )


class Compiled(CompiledKernel):
    """In the place of a kernel's code."""

    numbers = count()

    def __init__(self, src, target, options, launcher):
        self.src, self.target, self.options = src, target, options
        self.name, self.module, self.function = src.fn.__name__, 1, next(self.numbers)
        self.packed_metadata = options["num_warps"], options["num_stages"]
        self._run = launcher(self)


class Driver:
    """Devices of one kind."""

    def __init__(self):
        self.device, self.stream = None, 0
        self.launched = []
        self.utils = self
        self.launcher_cls = lambda src, metadata: self.launcher(None)

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return device, self.stream

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name, binary, shared, device):
        return 1, hash((name, binary, device)), 32, 0, 1024

    def launcher(self, compiled):
        def run(x, y, z, stream, function, metadata, told, enter, leave, *args):
            observers = told, enter, leave
            self.launched.append(
                Launched(compiled, (x, y, z), stream, function, metadata, observers, args)
            )

        return run

    def compile(self, src, target, options, **_):
        return Compiled(src, target, options, self.launcher)

    def last(self):
        return self.launched[-1]


def kernels():
    """All that the launchers start."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("hyperfast.kernels.triton."):
            found |= {id(k): k for k in vars(module).values() if isinstance(k, JITFunction)}
    return [k for k in found.values() if len(k.params) > 3]


@contextmanager
def pretended(compiling=False, driver=None):
    """On such devices; kernels are compiled in earnest, or not."""
    driver = driver or Driver()

    @contextmanager
    def on(device):
        before, driver.device = driver.device, device.index
        yield
        driver.device = before

    def forget():
        direct.made.clear()
        for kernel in kernels():
            kernel.device_caches.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", driver)
        patch.setattr(torch.cuda, "device", on)
        if not compiling:
            patch.setattr(triton.compiler, "compile", driver.compile)
        forget()
        try:
            yield driver
        finally:
            forget()


class Address:
    """A pointer to memory that is not there."""

    def __init__(self, dtype, address, index):
        self.dtype, self._address, self.device = dtype, address, torch.device("cuda", index)

    def data_ptr(self):
        return self._address


class Deaf(Driver):
    """Records nothing, lest it be timed."""

    def launcher(self, compiled):
        return lambda *_: None


def microseconds(call, repeats=300):
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats * 1e6


def main():
    """Of one launch of each kernel, in turns, without what the device's driver takes."""
    calls = {}

    def keep(kernel, programs, *args, **named):
        calls[kernel.__name__] = kernel, programs, args, named

    with pretended(driver=Deaf()):
        with instead(keep, "bf16", "sm_90"):
            run_kind("bf16", every=True)
        print("| kernel | arguments | constants | by Triton, us | past it, us |")
        print("|---|---|---|---|---|")
        for name, (kernel, programs, args, named) in calls.items():
            ways = (
                lambda k=kernel, p=programs, a=args, n=named: k[(p,)](*a, **n),
                lambda k=kernel, p=programs, a=args, n=named: direct.launch(k, p, a, n),
            )
            turns = [[microseconds(way) for way in ways] for _ in range(12)][1:]
            told = " | ".join(f"{median(times):.1f}" for times in zip(*turns, strict=True))
            print(f"| {name} | {len(args)} | {len(named)} | {told} |")


if __name__ == "__main__":
    main()
