"""Edge-conditioned convolution by its formula, which stores a matrix of every edge; and a race."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast.nets import NNConv


def stored(conv: NNConv, x: Tensor, edges: Tensor, features: Tensor) -> Tensor:
    """What ``conv`` computes: a matrix of every edge, a product with each, and their sums."""
    matrices = conv.nn(features).unflatten(1, (conv.in_channels, conv.out_channels))
    messages = torch.bmm(x[edges[0]].unsqueeze(1), matrices).squeeze(1)
    own = F.linear(x, conv.get_parameter("lin.weight"), conv.get_parameter("bias"))
    return own.index_add(0, edges[1], messages)


def race(
    conv: NNConv, edges: Tensor, features: Tensor, rounds: int
) -> dict[str, tuple[float, int]]:
    """Median seconds of a convolution and its gradients, and the bytes that are kept for these:
    NNConv and the formula, interleaved."""
    x = torch.randn(int(edges.max()) + 1, conv.in_channels, requires_grad=True)
    wanted = [x, *conv.parameters()]
    runners: dict[str, Callable[..., Tensor]] = {"NNConv": conv, "formula": partial(stored, conv)}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    kept: dict[str, int] = {}
    truth: list[Tensor] = []
    for _ in range(rounds):
        for name, run in runners.items():
            sizes: dict[int, int] = {}

            def keep(t: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
                storage = t.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
                return t

            start = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                y = run(x, edges, features)
            found = [y.detach(), *torch.autograd.grad(y.square().mean(), wanted)]
            seconds[name].append(time.perf_counter() - start)
            kept[name] = sum(sizes.values())
            truth = truth or found
            torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    return {name: (median(times), kept[name]) for name, times in seconds.items()}
