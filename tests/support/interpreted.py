"""What the suites share that run by Triton's interpreter."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch

import hyperfast
from hyperfast.kernels.triton import launch
from hyperfast.kernels.triton import stored as stored_networks
from hyperfast.plans import gpu

ragged_or_not = pytest.mark.parametrize("ragged", [False, True], ids=["batched", "ragged"])


@contextmanager
def on_triton_kernels(monkeypatch):
    """Runs the ops on Triton kernels; gives how many programs of each were launched."""
    count = Counter()
    start = launch.start

    def counting(kernel, programs, *args, **options):
        count[kernel.fn.__name__] += programs
        start(kernel, programs, *args, **options)

    monkeypatch.setattr(launch, "start", counting)
    with hyperfast.use_backend("triton"):
        yield count


def strided(t, how):
    """The same values under other strides; what lies between them is NaN."""
    if how == "transposed":
        return t.mT.contiguous().mT
    if how == "gaps":
        return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]
    return t[..., :1].expand_as(t)  # other values, of stride 0


# sizes of the network, tasks, rows a task, features
NETWORKS = [
    ((3, 6, 2), 3, 5, 4),
    ((1, 1), 1, 1, 1),
    ((17, 3, 17, 1), 3, 1, 17),
    ((3, 17, 63, 3, 2), 5, 3, 3),
    ((2, 33, 1), 3, 23, 5),
    ((5, 3, 2), 0, 2, 3),
    ((5, 3, 2), 3, 0, 2),
]
WIDE = ((3, 129, 2), 2, 3, 3)
one_kernel_or_layers = pytest.mark.parametrize("whole", [False, True], ids=["layers", "one"])


def choose(monkeypatch, whole):
    """One kernel for a network, or one for each layer, whatever the plan says, unless generated
    weights are transformed; and fp64 in blocks of rows, as narrower types are."""
    monkeypatch.setitem(stored_networks.TOGETHER, "fp64", (16, 8))
    monkeypatch.setattr(
        gpu, "one_kernel", lambda layers, *_: whole and not any(v.transform for v in layers)
    )
    monkeypatch.setattr(gpu, "fits_one_kernel", lambda sizes: whole)
