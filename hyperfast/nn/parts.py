"""Networks of chunked weights, a block at a time: generated, applied, forgotten, and made again in the
backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from hyperfast import checks
from hyperfast.activations import run_layers
from hyperfast.layout import transformed
from hyperfast.nn.gate import in_parts
from hyperfast.nn.hypernet import HyperNet
from hyperfast.nn.target import TargetNet, from_jagged
from hyperfast.ops import backends

State: TypeAlias = dict[str, Tensor]

# Numbers of a block, with all that they are made of.
BLOCK = 1 << 22


def run(
    hyper: HyperNet, target: nn.Module, x: Tensor, z: Tensor, task_ids: Tensor | None = None
) -> Tensor:
    """``target(x, hyper(z), task_ids)``; a block at a time where weights are chunked, layers linear
    and there is more than one block of them. Graphs and transforms of ``torch.func`` see the
    whole."""
    if torch.compiler.is_compiling() or not in_parts(hyper, target):
        return target(x, hyper(z), task_ids)
    assert isinstance(target, TargetNet)
    hyper.check_latents(z)
    tasks = len(z) if z.ndim == 2 else 1
    if (
        tasks * _numbers(hyper) <= BLOCK
        or checks.is_transformed()
        or backends.forced is not None
        or (z.ndim == 1 and task_ids is not None)
    ):
        return target(x, hyper(z), task_ids)
    checks.check_like_weight(hyper.generator.embeddings, x=x)
    apply = partial(_batched, hyper, target, dict(hyper.named_parameters()))
    if x.is_nested:
        return from_jagged(x, task_ids, tasks, lambda rows, ids: apply(rows, z, ids))
    if z.ndim == 2:
        return apply(x, z, task_ids)
    if x.ndim == 0 or x.shape[-1] != _ins(hyper):
        raise ValueError(
            f"x must have {_ins(hyper)} features in its last dimension, got {checks.shape(x)}"
        )
    y = apply(x.reshape(1, -1, x.shape[-1]), z.unsqueeze(0), None)
    return y.view(*x.shape[:-1], y.shape[-1])


def _batched(
    hyper: HyperNet,
    target: TargetNet,
    state: State,
    x: Tensor,
    z: Tensor,
    task_ids: Tensor | None,
) -> Tensor:
    """``state`` holds the parameters of now: in the backward pass ``hyper`` may have others."""
    tasks, each = z.shape[0], _numbers(hyper)
    shared = task_ids is None and x.ndim == 3 and x.shape[0] == 1
    rows = x.expand(tasks, -1, -1) if shared else x
    checks.check_rows(rows, _ins(hyper), tasks, task_ids, "z")
    checks.check_dense(x=x)
    checks.check_in_range(task_ids, tasks)

    def whole(x: Tensor, z: Tensor, ids: Tensor | None) -> Tensor:
        return target(x, functional_call(hyper, state, (z,)), ids)

    one = each > BLOCK
    step = 1 if one else BLOCK // each
    run = partial(_by_outputs, hyper, target, state) if one else partial(_anew, whole)
    latents = z.split(step)
    if task_ids is None:
        blocks = [x] * len(latents) if shared else x.split(step)
        return torch.cat([run(*pair, None) for pair in zip(blocks, latents, strict=True)])
    block = task_ids // step
    order = block.argsort(stable=True)
    counts = block.bincount(minlength=len(latents)).tolist()
    rows, ids = (t.index_select(0, order).split(counts) for t in (x, task_ids % step))
    found = [of for of in zip(rows, latents, ids, strict=True) if len(of[2])]
    y = torch.cat([run(*of) for of in found or [(x, latents[0], task_ids)]])
    return y.index_select(0, order.argsort())


def _by_outputs(
    hyper: HyperNet,
    target: TargetNet,
    state: State,
    x: Tensor,
    z: Tensor,
    task_ids: Tensor | None,
) -> Tensor:
    """One network, larger than a block, some outputs of a layer at a time."""
    made = hyper.generator
    state = {name.removeprefix("generator."): p for name, p in state.items()}
    own = state.pop("base", None)
    base = None if own is None else hyper.spec.split(own)

    def part(z: Tensor, n: int, first: int, last: int) -> Tensor:
        w = functional_call(made, state, (z, (n, first, last))).squeeze(0)
        return w if base is None else w + base[n].view(len(base[n]), -1)[first:last]

    def outputs(x: Tensor, z: Tensor, n: int, has_bias: bool, first: int, last: int) -> Tensor:
        w = transformed(target.weight_transform, part(z, n, first, last))
        return F.linear(x, w, part(z, n + 1, first, last).squeeze(1) if has_bias else None)

    def linear(x: Tensor, n: int, has_bias: bool) -> Tensor:
        out = hyper.spec.shapes[n][0]
        step = made.layout.outputs(n, made.numbers, BLOCK)
        firsts = range(0, out, step)
        return torch.cat(
            [_anew(outputs, x, z, n, has_bias, at, min(at + step, out)) for at in firsts], -1
        )

    n, linears = 0, []
    for has_bias in hyper.spec.biases:
        linears.append(partial(linear, n=n, has_bias=has_bias))
        n += 1 + has_bias
    y = run_layers(x.reshape(-1, x.shape[-1]), linears, target.layer_activations(len(linears)))
    return y.view(*x.shape[:-1], y.shape[-1])


def _anew(call: Callable[..., Tensor], *args: object) -> Tensor:
    """``call(*args)``, made again in the backward pass. Nothing in it is random."""
    return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False)


def _ins(hyper: HyperNet) -> int:
    return hyper.spec.shapes[0][1]


def _numbers(hyper: HyperNet) -> int:
    """That one network takes while it is made."""
    made = hyper.generator
    return sum(map(math.prod, zip(made.layout.counts, made.numbers, strict=True)))
