"""Networks of chunked weights, a block at a time: generated, applied, forgotten, and made again in
the backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from hyperfast import checks
from hyperfast.activations import run_layers
from hyperfast.layout import MLPSpec, transformed
from hyperfast.nn.gate import in_parts
from hyperfast.nn.hypernet import HyperNet
from hyperfast.nn.target import TargetNet, from_jagged
from hyperfast.ops import backends

# Numbers, weights and all that they are made of. Up to WHOLE networks are made whole: there 4 to
# 16 million train in 0.6 to 1 of the time of blocks, which are made twice. Beyond, a block has
# BLOCK, or one network up to WHOLE: from 19 million on blocks take 0.2 to 0.9 of the time, because
# tensors of more than 32 MiB are new pages each time (glibc). Blocks of 8 million do as well, of 2
# less so, of 1 take 1.7 times as long (Xeon, AVX-512, 2 threads, fp32).
WHOLE, BLOCK = 1 << 24, 1 << 22


def run(
    hyper: HyperNet, target: nn.Module, x: Any, z: Tensor, task_ids: Tensor | None = None
) -> Any:
    """``target(x, hyper(z), task_ids)``; a block at a time where weights are chunked, layers linear
    and there is much of them. Compiled graphs and transforms of ``torch.func`` see the whole."""
    if torch.compiler.is_compiling() or not in_parts(hyper, target):
        return target(x, hyper(z), task_ids)
    assert isinstance(target, TargetNet)
    hyper.check_latents(z)
    tasks = len(z) if z.ndim == 2 else 1
    if (
        tasks * _numbers(hyper) <= WHOLE
        or checks.is_transformed()
        or backends.forced is not None
        or (z.ndim == 1 and task_ids is not None)
    ):
        return target(x, hyper(z), task_ids)
    checks.check_like_weight(hyper.generator.embeddings, x=x)
    apply = partial(_batched, hyper, target)
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
    hyper: HyperNet, target: TargetNet, x: Tensor, z: Tensor, task_ids: Tensor | None
) -> Tensor:
    tasks, each = z.shape[0], _numbers(hyper)
    shared = task_ids is None and x.ndim == 3 and x.shape[0] == 1
    rows = x.expand(tasks, -1, -1) if shared else x
    checks.check_rows(rows, _ins(hyper), tasks, task_ids, "z")
    checks.check_dense(x=x)
    checks.check_in_range(task_ids, tasks)
    large = each > WHOLE
    step = 1 if large else max(BLOCK // each, 1)
    one = partial(_by_outputs if large else _whole, hyper, target)
    latents = z.split(step)
    if task_ids is None:
        blocks = [x] * len(latents) if shared else x.split(step)
        return torch.cat([one(*task, None) for task in zip(blocks, latents, strict=True)])
    block = task_ids // step
    order = block.argsort(stable=True)
    counts = block.bincount(minlength=len(latents)).tolist()
    parts, ids = (t.index_select(0, order).split(counts) for t in (x, task_ids % step))
    found = [task for task in zip(parts, latents, ids, strict=True) if len(task[2])]
    y = torch.cat([one(*task) for task in found or [(x, latents[0], task_ids)]])
    return y.index_select(0, order.argsort())


def _whole(
    hyper: HyperNet, target: TargetNet, x: Tensor, z: Tensor, task_ids: Tensor | None
) -> Tensor:
    """A block of tasks."""
    names, parameters = zip(*hyper.named_parameters(), strict=True)

    def call(x: Tensor, z: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        return target(x, functional_call(hyper, state, (z,)), task_ids)

    return _anew(call, x, z, *parameters)


def _by_outputs(
    hyper: HyperNet, target: TargetNet, x: Tensor, z: Tensor, task_ids: Tensor | None
) -> Tensor:
    """One task, whose network is large: some outputs of a layer at a time."""
    made, shapes = hyper.generator, hyper.spec.shapes
    names, parameters = zip(*made.named_parameters(), strict=True)
    base = None if hyper.base is None else hyper.spec.split(hyper.base)

    def outputs(x: Tensor, n: int, has_bias: bool, first: int, last: int) -> Tensor:
        tensors = range(n, n + 1 + has_bias)
        added = (
            [] if base is None else [base[m].view(shapes[m][0], -1)[first:last] for m in tensors]
        )

        def call(x: Tensor, z: Tensor, *given: Tensor) -> Tensor:
            state = dict(zip(names, given, strict=False))
            w, *b = (
                functional_call(made, state, (z, (m, first, last))).squeeze(0) for m in tensors
            )
            if added:
                w, *b = map(torch.add, (w, *b), given[len(names) :])
            w = transformed(target.weight_transform, w)
            return F.linear(x, w, b[0].squeeze(1) if b else None)

        return _anew(call, x, z, *parameters, *added)

    def linear(x: Tensor, n: int, has_bias: bool) -> Tensor:
        out = shapes[n][0]
        step = made.layout.outputs(n, made.numbers, BLOCK)
        firsts = range(0, out, step)
        return torch.cat(
            [outputs(x, n, has_bias, first, min(first + step, out)) for first in firsts], -1
        )

    n, linears = 0, []
    assert isinstance(hyper.spec, MLPSpec)
    for has_bias in hyper.spec.biases:
        linears.append(partial(linear, n=n, has_bias=has_bias))
        n += 1 + has_bias
    y = run_layers(x.reshape(-1, x.shape[-1]), linears, target.layer_activations(len(linears)))
    return y.view(*x.shape[:-1], y.shape[-1])


def _ins(hyper: HyperNet) -> int:
    return hyper.spec.shapes[0][1]


def _numbers(hyper: HyperNet) -> int:
    """That one network takes while it is made."""
    made = hyper.generator
    return sum(map(math.prod, zip(made.layout.counts, made.numbers, strict=True)))


def _anew(call: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``call(*tensors)``, called again in the backward pass. (A checkpoint of PyTorch's notes every
    tensor that is saved inside, 60 KiB a block.)"""
    return _Anew.apply(call, *tensors)


class _Anew(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        kind = tensors[0].device.type
        ctx.call = call
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), False
        ctx.save_for_backward(*tensors)
        return call(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        create_graph, wanted = torch.is_grad_enabled(), ctx.needs_input_grad[1:]
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            # Aliases: hooks of the tensors are for the sum of what all blocks return.
            tensors = [t.view_as(t) for t in ctx.saved_tensors]
            y = ctx.call(*tensors)
        leaves = [t for t, want in zip(tensors, wanted, strict=True) if want]
        found = iter(
            torch.autograd.grad(y, leaves, grads, create_graph=create_graph, allow_unused=True)
        )
        return None, *(next(found) if want else None for want in wanted)
