"""Where a derivative by hand must be one that autograd has seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hyperfast import checks


def wanted_by_autograd(grads: Sequence[Tensor | None]) -> bool:
    """Whether the derivative will be differentiated, or ``grads`` are those of a batch of calls."""
    batched = any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)
    return batched or torch.is_grad_enabled() or checks.is_transformed()


def gradients(
    run: Callable[..., Sequence[Tensor]],
    given: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of what was given to ``run``, by autograd, which records how they came about
    where the caller asks for it, and whose rules know every transform."""
    if all(g is None for g in grads):
        return [None] * len(given)
    recorded = torch.is_grad_enabled()
    # Views: what was given may depend on each other, and each gets its own share alone.
    with torch.enable_grad():
        own = [None if t is None else t.view_as(t) for t in given]
        made = run(*own)
    pairs = [(s, g) for s, g in zip(made, grads, strict=True) if g is not None]
    wanted = [t for t in own if t is not None and t.requires_grad]
    outputs, weights = zip(*pairs, strict=True)
    found = iter(
        torch.autograd.grad(outputs, wanted, weights, create_graph=recorded, allow_unused=True)
    )
    return [next(found) if t is not None and t.requires_grad else None for t in own]
