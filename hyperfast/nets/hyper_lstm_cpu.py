"""All steps of a HyperLSTM by the C++ kernels, which take a share of the sequences through all of
them on a thread of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperfast.nets.hyper_lstm_steps import State, Weights
from hyperfast.ops import backends, hyper_lstm, hyper_lstm_backward


def takes(given: Sequence[Tensor | None]) -> bool:
    """Whether the kernels take such tensors, and are there and allowed.

    Raises:
        RuntimeError: a backend is insisted on that does not take them.
    """
    if backends.forced == "reference":
        return False
    x, fit = given[0], backends.fit_for_cpu(given)
    assert x is not None
    if backends.forced is None:
        return fit and backends.has_kernel("cpp", "hyper_lstm")
    backends.insist(backends.forced, "hyper_lstm", x.device.type)
    if not fit:
        raise RuntimeError(
            f"backend {backends.forced!r} has no kernel of hyper_lstm for such tensors: all must "
            f"be plain float32 or float64 ones, got x of {x.dtype}"
        )
    return True


def run(
    x: Tensor,
    keep: Tensor | None,
    start: State,
    sizes: Sequence[int],
    w: Weights,
    *,
    keep_all: bool,
) -> tuple[Tensor, State, list[Tensor]]:
    """What :func:`unroll` returns, and what :func:`backward` needs beside it."""
    h, *made = hyper_lstm(x, keep, list(start), list(w.tensors()), sizes, keep_all)
    return h, State(*made[:4]), made[4:]


def backward(
    x: Tensor,
    keep: Tensor | None,
    start: State,
    sizes: Sequence[int],
    w: Weights,
    h: Tensor,
    kept: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """As :func:`hyper_lstm_backward.backward`."""
    grad_h, *of_ends = grads
    ends = [torch.zeros_like(t) if g is None else g for t, g in zip(start, of_ends, strict=True)]
    given = x, keep, list(start), list(w.tensors()), sizes
    which = [wanted[0], *wanted[6:]]
    found = hyper_lstm_backward(grad_h, ends, *given, [h, *kept], which)
    dx, *of_w = (t if want else None for t, want in zip((found[0], *found[5:]), which, strict=True))
    return dx, None, *found[1:5], *of_w
