"""The C++ kernels and their own choice of plan, which csrc/plan.cpp makes: here it is asked."""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from types import ModuleType

import torch

from hyperfast.plans.sizes import Sizes


def _load() -> tuple[ModuleType | None, str]:
    """The extension, whose load registers its kernels, or why it is not there."""
    if os.environ.get("HYPERFAST_NO_EXT") == "1":
        return None, "HYPERFAST_NO_EXT=1 is set"
    try:
        return importlib.import_module("hyperfast._C"), ""
    except ModuleNotFoundError:
        return None, "it was not built, which `pip install .` does unless HYPERFAST_NO_EXT=1 is set"
    except ImportError as error:
        return None, str(error)


EXTENSION, EXTENSION_ERROR = _load()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plan(sizes: Sizes, dtype: torch.dtype, gradients: bool = False) -> str:
    """The plan by which the kernels run one layer."""
    assert EXTENSION is not None
    tasks, rows, _, _, features, ragged, *_ = sizes
    return EXTENSION.plan(_name(dtype), ragged, tasks, rows, sizes.params, features, gradients)


def runs_whole(
    network: str, dtype: torch.dtype, ragged: bool, tasks: int, rows: int, features: int
) -> bool:
    """Whether the kernels run a generated network task by task, all layers of one together, rather
    than layer by layer."""
    assert EXTENSION is not None
    return EXTENSION.runs_whole(network, _name(dtype), ragged, tasks, rows, features)


# Of its parameters, for each two threads of a Xeon (Emerald Rapids). A trunk of 32 to 64 trains in
# the op in 0.75 to 0.95 of the time, of 1 to 4,096 latents; one of 128 to 128 in 0.8 to 0.87 of few
# latents, but in 1.03 to 1.19 of 256 and more; one of 250 to 256 in 1.3.
TRUNK_BYTES = 48 << 10


def takes_trunk(numel: int, dtype: torch.dtype) -> bool:
    """Whether the op of networks also runs a trunk of so many parameters before them. The products
    of a larger one are worth a call of the library's each."""
    return EXTENSION is not None and numel * max(dtype.itemsize, 4) <= TRUNK_BYTES


def in_huge_pages(t: torch.Tensor) -> torch.Tensor:
    """``t``, whose memory nobody has touched yet, in huge pages if it is large and on the CPU:
    where pages of 4 KiB are looked up slowly, as in virtual machines, networks at random places are
    read from these at 1.2 times the rate."""
    if EXTENSION is not None and t.is_cpu:
        EXTENSION.ask_for_huge_pages(t.data_ptr(), t.numel() * t.element_size())
    return t


@lru_cache(maxsize=4096)
def keeps(
    network: str, dtype: torch.dtype, ragged: bool, tasks: int, rows: int, features: int
) -> bool:
    """Whether a forward pass in training keeps its pre-activations; else the backward pass makes
    them again."""
    if EXTENSION is None:
        return True
    return EXTENSION.keeps(network, _name(dtype), ragged, tasks, rows, features)
