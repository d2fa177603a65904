"""Kernels launched past Triton: the same code, with the same arguments, as Triton would launch, on
devices that are pretended. Triton's own launch of each call says what is right."""

import random

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from hyperfast import info  # noqa: E402
from hyperfast.kernels.triton import direct, look_up  # noqa: E402
from tests.support.launches import KINDS, instead, run_kind  # noqa: E402
from tests.support.pretended import Address, kernels, pretended  # noqa: E402

pytestmark = pytest.mark.skipif(bool(direct.WHY_NOT), reason=direct.WHY_NOT)


# What is launched, and how many of its arguments are pointers.
POINTERS = {
    "_keys": 2, "_look_up": 5, "_pack": 2, "_contract": 10, "_outer": 5, "_task_linear": 8,
    "_task_parts": 5, "_task_outer": 7, "_hyper_mlp": 9, "_task_mlp": 6,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_ops_launch(kind):
    """Every kernel, on arguments of every size."""
    started = set()

    def thrice(kernel, programs, *args, **named):
        """By Triton, the first time and the second time."""
        kernel[(programs,)](*args, **named)
        right = driver.last()
        for _ in range(2):
            direct.launch(kernel, programs, args, named)
            assert driver.last().same(right)
        assert driver.last().direct
        assert not right.direct
        started.add(kernel.__name__)

    with pretended() as driver, instead(thrice, kind, "sm_90"):
        run_kind(kind, every=True)
    assert started >= {"_contract", "_outer", "_task_linear", "_task_outer"}
    if kind == "bf16":
        assert started == POINTERS.keys() - {"_look_up"}


# At, and on both sides of, everything that Triton compiles a kernel for.
NUMBERS = (0, 1, -1, 2, 8, 15, 16, 17, 24, 48, -16, 2**31 - 1, 2**31, 2**31 + 16, -(2**31),
           -(2**31) - 1, 2**32 + 1, 2**63 - 1, 2**63 + 1, 2**63 + 16)  # fmt: skip
ADDRESSES = [(1 << 40) + offset for offset in (0, 2, 8, 15, 16, 32)]
DTYPES = torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool
CONSTANTS = 1, 2, 16, 0, True, 1.5, "relu", (1, 16), (1, None), tl.float32, tl.int64, None
OPTIONS = {"num_warps": (4, 8), "num_stages": (4, 2), "maxnreg": (128, 168)}


class Calls:
    """Calls of one kernel that differ from the first in one or two things."""

    def __init__(self, kernel, seed):
        self.draw = random.Random(seed)
        self.pointers = POINTERS[kernel.__name__]
        numbers = sum(not p.is_constexpr for p in kernel.params) - self.pointers
        self.args = [self.pointer(n > 0) for n in range(self.pointers)]
        self.args += [self.draw.choice(NUMBERS) for _ in range(numbers)]
        self.constants = kernel.arg_names[len(self.args) :]
        self.named = {name: self.draw.choice(CONSTANTS) for name in self.constants}
        self.named |= {name: values[0] for name, values in OPTIONS.items()}

    def pointer(self, optional):
        if optional and self.draw.random() < 0.2:
            return None
        return Address(*map(self.draw.choice, (DTYPES, ADDRESSES, range(3))))

    def one(self):
        args, named = list(self.args), dict(self.named)
        for _ in range(self.draw.randint(1, 2)):
            what = self.draw.randrange(8)
            if what == 0:
                name, values = self.draw.choice(list(OPTIONS.items()))
                named.pop(name, None)
                if self.draw.randrange(2):
                    named[name] = self.draw.choice(values)
            elif what == 1:
                named[self.draw.choice(self.constants)] = self.draw.choice(CONSTANTS)
            else:
                n = self.draw.randrange(len(args))
                number = n >= self.pointers
                args[n] = self.draw.choice(NUMBERS) if number else self.pointer(n > 0)
        return tuple(args), named


@pytest.mark.parametrize("kernel", [k for k in kernels() if k.__name__ in POINTERS], ids=str)
def test_whatever_was_launched_before(kernel):
    """Thousands of calls: each launches what Triton does, most of them past it."""
    past = 0
    with pretended() as driver:
        for seed in range(3):
            calls = Calls(kernel, seed)
            for programs in range(1, 1001):
                args, named = calls.one()
                driver.stream = calls.draw.randrange(3)
                direct.launch(kernel, programs, args, named)
                ours = driver.last()
                past += ours.direct
                driver.device = args[0].device.index
                kernel[(programs,)](*args, **named)
                driver.device = None
                assert ours.same(driver.last())
                assert not driver.last().direct
    assert past > 500


def look(programs=3, kernel=look_up._look_up):
    """One launch: ids, codes, slots, missing, fault, and four numbers."""
    ids = torch.zeros(48, dtype=torch.int64)
    args = ids, ids, ids.clone(), torch.zeros(48, dtype=torch.bool), ids[:1], 48, 48, 7, 1
    direct.launch(kernel, programs, args, {"BLOCK": 64})


def test_what_the_compiler_makes():
    """The real thing, but for the device that would load and run it."""
    with pretended(compiling=True) as driver:
        look()
        look()
    first, second = driver.launched
    assert second.direct
    assert not first.direct
    assert first[1:5] == second[1:5]
    assert first.grid == (3, 1, 1)
    assert first.metadata == (4, 1, 0)  # warps, blocks of a cluster, shared memory
    assert [a for a in second.args if not isinstance(a, torch.Tensor)] == [48, 48, 7, 1, 64]


def told(*_, **__):
    raise AssertionError("somebody listens")


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_who_listens_hears_of_launches(hook, monkeypatch):
    heard = []
    chain = getattr(triton.knobs.runtime, hook)
    with pretended() as driver:
        look()
        chain.add(heard.append)
        look()
        assert driver.last().observers[1 if "enter" in hook else 2] is chain
        chain.remove(heard.append)
        look()
        assert driver.last().direct
        monkeypatch.setattr(triton.knobs.runtime, hook, told)
        look()
        assert not driver.last().direct


def test_who_compiles_otherwise_is_heard(monkeypatch):
    with pretended() as driver:
        look()
        knobs = triton.knobs
        for holder, name, value in (
            (knobs.runtime, "debug", True),
            (knobs.runtime, "add_stages_inspection_hook", lambda: ("key", "hash")),
            (knobs.compilation, "instrumentation_mode", "yes"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(holder, name, value)
                look()
                assert not driver.last().direct
        look()
        assert driver.last().direct
        seen = []
        monkeypatch.setattr(look_up._look_up, "pre_run_hooks", [lambda *_, **__: seen.append(1)])
        look()
        assert seen


def test_what_was_not_compiled_is_not_kept(monkeypatch):
    """A hook keeps Triton from compiling: there is nothing to call the next time."""
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **_: True)
    with pretended() as driver:
        look()
        look()
        assert not driver.launched


@pytest.mark.parametrize(
    ("where", "name", "value", "why"),
    [
        (triton, "__version__", "3.5.1", "3.5.1"),
        (triton, "__version__", "4.0.0+git", "4.0.0"),
        (torch.version, "hip", "7.0", "ROCm"),
        (direct, "INTERPRETED", True, "TRITON_INTERPRET"),
        (triton.knobs, "runtime", object(), "not as it is known"),
    ],
)
def test_where_launches_stay_triton_s(where, name, value, why, monkeypatch):
    with pretended() as driver:
        look()
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            reason = direct._why_not()
        assert why in reason
        monkeypatch.setattr(direct, "WHY_NOT", reason)
        look()
        assert not driver.last().direct
        assert info._detail("triton") == f", launches by Triton's own way: {reason}"


def test_the_switch(monkeypatch):
    monkeypatch.setenv("HYPERFAST_DIRECT_LAUNCH", "0")
    assert direct._why_not() == "HYPERFAST_DIRECT_LAUNCH=0"


def test_info_says_that_launches_are_direct():
    assert info._detail("triton") == ", launches what it has compiled directly"
