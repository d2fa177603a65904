"""Networks of chunked weights, a block at a time: generated, applied, forgotten, and made again in
the backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast import checks
from hyperfast.activations import run_layers
from hyperfast.functional import stored_mlp
from hyperfast.layout import MLPSpec, transformed
from hyperfast.nn.chunked import Chunked, Inside
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
    and there is much of them. Compiled graphs, transforms of ``torch.func`` and tensors without
    data see the whole."""
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()  # a trace holds ops, and no Function of Python
        or not in_parts(hyper, target)
    ):
        return target(x, hyper(z), task_ids)
    hyper.check_latents(z)
    checks.check_like_weight(hyper.generator.embeddings, x=x)
    if z.ndim == 1 and task_ids is not None:
        raise ValueError(
            f"z must have shape (B, {hyper.z_dim}) when task_ids is given, got {checks.shape(z)}"
        )
    tasks = len(z) if z.ndim == 2 else 1
    if (
        tasks * _numbers(hyper) <= WHOLE
        or checks.is_transformed()
        or backends.forced is not None
        or not all(checks.has_data(t) for t in (x, z, task_ids) if isinstance(t, Tensor))
    ):
        return target(x, hyper(z), task_ids)
    assert isinstance(target, TargetNet)
    apply = _Model(hyper, target).batched
    if x.is_nested:
        return from_jagged(x, task_ids, tasks, lambda rows, ids: apply(rows, z, ids))
    if z.ndim == 2:
        return apply(x, z, task_ids)
    ins = hyper.spec.shapes[0][1]
    if x.ndim == 0 or x.shape[-1] != ins:
        raise ValueError(f"x must have {ins} features in its last dimension, got {checks.shape(x)}")
    y = apply(x.reshape(1, -1, ins), z.unsqueeze(0), None)
    return y.view(*x.shape[:-1], y.shape[-1])


def _numbers(hyper: HyperNet) -> int:
    """That one network takes while it is made."""
    made = hyper.generator
    return sum(map(math.prod, zip(made.layout.counts, made.numbers(hyper.z_dim), strict=True)))


class _Model:
    """A model as it is at a call. Blocks are made of this, and made again: meanwhile its modules
    may change, or be at work in other threads."""

    def __init__(self, hyper: HyperNet, target: TargetNet):
        assert isinstance(hyper.spec, MLPSpec)
        self.spec, self.transform, self.base = hyper.spec, target.weight_transform, hyper.base
        self.activations = deepcopy(target.layer_activations(len(self.spec.biases)))
        self.made: Chunked = hyper.generator
        self.numbers, self.each = self.made.numbers(hyper.z_dim), _numbers(hyper)
        self.tensors: list[Tensor | None] = [
            *(self.made.embeddings, self.made.scale, self.made.offset)
        ]
        self.chains = [*map(self._steps, (self.made.trunk, *self.made.heads))]

    def _steps(self, module: nn.Module) -> list[Any]:
        """What a chain calls one after the other; for a linear layer, where its tensors are."""
        if isinstance(module, nn.Sequential):
            return [step for part in module for step in self._steps(part)]
        if not isinstance(module, nn.Linear):
            return [deepcopy(module)]
        self.tensors += module.weight, module.bias
        return [len(self.tensors) - 2]

    def _inside(self, tensors: Sequence[Any]) -> Inside:
        """What makes chunks of ``tensors``, in the order of those of the model."""
        embeddings, scale, offset, *_ = tensors
        trunk, *heads = (partial(_through, steps, tensors) for steps in self.chains)
        return Inside(embeddings, scale, offset, trunk, heads)

    def batched(self, x: Tensor, z: Tensor, task_ids: Tensor | None) -> Tensor:
        """The networks of latents ``(B, z_dim)``."""
        tasks = z.shape[0]
        shared = task_ids is None and x.ndim == 3 and x.shape[0] == 1
        rows = x.expand(tasks, -1, -1) if shared else x
        checks.check_rows(rows, self.spec.sizes[0], tasks, task_ids, "z")
        checks.check_dense(x=x)
        checks.check_in_range(task_ids, tasks)
        large = self.each > WHOLE
        step = 1 if large else max(BLOCK // self.each, 1)
        one = self._by_outputs if large else self._whole
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

    def _whole(self, x: Tensor, z: Tensor, task_ids: Tensor | None) -> Tensor:
        """A block of tasks."""

        def call(x: Tensor, z: Tensor, base: Tensor | None, *tensors: Tensor | None) -> Tensor:
            flat = self.made.flat(z, self._inside(tensors))
            flat = flat if base is None else flat + base
            return stored_mlp(x, flat, self.spec, self.activations, task_ids, self.transform)

        return _anew(call, x, z, self.base, *self.tensors)

    def _by_outputs(self, x: Tensor, z: Tensor, task_ids: Tensor | None) -> Tensor:
        """One task, whose network is large: some outputs of a layer at a time."""
        base = () if self.base is None else self.spec.split(self.base)
        n, linears = 0, []
        for has_bias in self.spec.biases:
            own = slice(n, n + 1 + has_bias)
            linears.append(partial(self._linear, z, range(own.start, own.stop), base[own]))
            n = own.stop
        y = run_layers(x.reshape(-1, x.shape[-1]), linears, self.activations)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _linear(self, z: Tensor, own: Sequence[int], base: Sequence[Tensor], x: Tensor) -> Tensor:
        """The layer of these parameters: a matrix, and a bias or none."""
        out = self.spec.shapes[own[0]][0]
        step = self.made.layout.outputs(own[0], self.numbers, BLOCK)
        # A split has one gradient, a slice for each block one of the size of all.
        added = [piece.view(out, -1).split(step) for piece in base]

        def block(first: int, *added: Tensor) -> Tensor:
            last = min(first + step, out)

            def call(x: Tensor, z: Tensor, *given: Tensor) -> Tensor:
                inside = self._inside(given[len(added) :])
                made = [self.made.part(z, n, first, last, inside).squeeze(0) for n in own]
                w, *b = map(torch.add, made, given) if added else made
                return F.linear(x, transformed(self.transform, w), b[0].squeeze(1) if b else None)

            return _anew(call, x, z, *added, *self.tensors)

        firsts = range(0, out, step)
        return torch.cat([block(*task) for task in zip(firsts, *added, strict=True)], -1)


def _through(steps: Sequence[Any], tensors: Sequence[Any], x: Tensor) -> Tensor:
    for step in steps:
        linear = isinstance(step, int)
        x = F.linear(x, tensors[step], tensors[step + 1]) if linear else step(x)
    return x


class _Anew(torch.autograd.Function):
    """``call(*tensors)``, called again in the backward pass. (A checkpoint of PyTorch's notes every
    tensor that is saved inside, 60 KiB a block.)"""

    @staticmethod
    def forward(
        ctx: Any, call: Callable[..., Tensor], x: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        kind = x.device.type
        ctx.call = call
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), False
        ctx.save_for_backward(x, *tensors)
        return call(x, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        create_graph, wanted = torch.is_grad_enabled(), ctx.needs_input_grad[1:]
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            # Aliases: hooks of the tensors are for the sum of what all blocks return.
            tensors = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
            y = ctx.call(*tensors)
        if not y.requires_grad:  # what is trained has no part in this block
            return None, *[None] * len(wanted)
        leaves: Any = [t for t, want in zip(tensors, wanted, strict=True) if want]
        found = iter(
            torch.autograd.grad(y, leaves, grads, create_graph=create_graph, allow_unused=True)
        )
        return None, *(next(found) if want else None for want in wanted)


_anew: Callable[..., Tensor] = _Anew.apply
