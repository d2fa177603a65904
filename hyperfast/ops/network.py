"""Whole networks as one op: one crossing from Python, hidden layers that stay in a kernel.

``hyper_mlp`` generates and applies every layer of the target; ``task_mlp`` applies given weights.
A backend registers its kernels for its device's key; elsewhere the layers run one by one, through
the ops of :mod:`hyperfast.ops.layer`. Derivatives beyond the first, and all function transforms, go
by the layers.

``network`` is the text of a network, :class:`hyperfast.layout.Network`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hyperfast import checks
from hyperfast.activations import run_layers
from hyperfast.kernels import reference
from hyperfast.kernels.rows import blocks
from hyperfast.layout import TRANSFORMS, Layer, Network, of_layer
from hyperfast.ops.define import (
    IDS,
    ROW,
    SHARED,
    TASK,
    count_flops,
    define,
    differentiate,
)
from hyperfast.ops.layer import (
    hyper_linear,
    hyper_linear_backward,
    task_linear,
    task_linear_grad_weight,
)
from hyperfast.plans import cpu
from hyperfast.plans.sizes import BLOCK


def _check(
    rows: list[Tensor],
    h: Tensor,
    task_ids: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    network: str,
) -> Network:
    net = Network.for_kernels(network)
    checks.check_rows_match(rows, [h], len(h), task_ids)
    checks.check_in_range(task_ids, len(h))
    if weight.shape != (net.numel, h.shape[1]):
        raise ValueError(
            f"weight must have shape {(net.numel, h.shape[1])}, got {checks.shape(weight)}"
        )
    if bias is not None and bias.shape != (net.numel,):
        raise ValueError(f"bias must have shape ({net.numel},), got {checks.shape(bias)}")
    if rows[-1].shape[-1] != net.sizes[0]:
        raise ValueError(f"x must have {net.sizes[0]} columns, got {checks.shape(rows[-1])}")
    return net


def by_layers(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    task_ids: Tensor | None,
    network: str,
    keep: list[Tensor] | None = None,
) -> Tensor:
    """What ``hyper_mlp`` means: layer after layer, differentiable to any order."""
    layers = Network.for_kernels(network).layers

    def linear(layer: Layer, x: Tensor) -> Tensor:
        return hyper_linear(x, h, *of_layer(weight, bias, layer), task_ids, layer.transform, "")

    return run_layers(x, (partial(linear, v) for v in layers), (v.activate for v in layers), keep)


def _hyper_mlp(x, h, weight, bias, task_ids, network, keep):
    net = _check([x], h, task_ids, weight, bias, network)
    pres: list[Tensor] | None = [] if keep else None
    y = by_layers(x, h, weight, bias, task_ids, network, pres)
    kept = [pre.flatten() for pre in pres[: len(net.kept)]] if pres else []
    return y.contiguous(), torch.cat(kept) if kept else x.new_empty(0)


def _hyper_mlp_backward(grad, x, h, weight, bias, task_ids, preactivations, network, output_mask):
    net = _check([grad, x], h, task_ids, weight, bias, network)
    rows, layers = x.shape[:-1], net.layers
    if net.kept and not preactivations.numel():  # they were not kept
        preactivations = _hyper_mlp(x, h, weight, bias, task_ids, network, True)[1]
    if preactivations.shape != (rows.numel() * sum(net.kept),):
        raise ValueError(
            f"preactivations must have shape ({rows.numel() * sum(net.kept)},), "
            f"got {checks.shape(preactivations)}"
        )
    pieces = preactivations.split([rows.numel() * width for width in net.kept])
    pres = [p.view(*rows, width) for p, width in zip(pieces, net.kept, strict=True)]
    hidden = zip(layers[:-1], pres, strict=False)
    inputs = [x, *(layer.activate(pre) for layer, pre in hidden)]
    # Lest 16-bit sums over the layers be rounded after each.
    grad_h = torch.zeros_like(h, dtype=torch.promote_types(h.dtype, torch.float32))
    weights, biases = [], []
    for n, layer in reversed(list(enumerate(layers))):
        if n < len(pres):
            grad = grad * layer.slope(pres[n])
        made, transform = of_layer(weight, bias, layer), layer.transform
        made_of = made.matrix, made.matrix_bias, made.vector, task_ids, transform
        found = hyper_linear_backward(grad, inputs[n], h, *made_of, output_mask[1:], "")
        if output_mask[1]:
            grad_h += found[0]
        weights.append(found[1])
        biases.append(found[2])
        if n > 0 or output_mask[0]:
            grad = hyper_linear(grad, h, *made.transposed, task_ids, transform, "")
    return (
        grad if output_mask[0] else x.new_empty(0),
        grad_h.to(h.dtype) if output_mask[1] else x.new_empty(0),
        torch.cat(weights[::-1]) if output_mask[2] else x.new_empty(0),
        torch.cat(biases[::-1]) if output_mask[3] else x.new_empty(0),
    )


def _hyper_mlp_fake(x, h, weight, bias, task_ids, network, keep):
    net, rows = Network.for_kernels(network), x.shape[:-1]
    count = math.prod(rows) * sum(net.kept) if keep else 0
    return x.new_empty(*rows, net.sizes[-1]), x.new_empty(count)


def _hyper_mlp_backward_fake(grad, x, h, weight, *rest):
    shapes = (x.shape, h.shape, weight.shape, weight.shape[:1])
    return tuple(
        x.new_empty(shape if wanted else (0,))
        for shape, wanted in zip(shapes, rest[-1], strict=True)
    )


def _hyper_mlp_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.network = inputs[5]
    ctx.set_materialize_grads(False)


def _hyper_mlp_autograd(ctx, grad, _):
    return *_gradients(ctx, grad), *[None] * 3


def _views(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Views, so that a gradient with respect to one argument does not run through another that was
    computed from it: the engine adds that path itself."""
    return [None if t is None else t.view_as(t) for t in tensors]


def _gradients(ctx, grad):
    """Gradients of x, h, weight and bias."""
    *tensors, preactivations = ctx.saved_tensors
    need = ctx.needs_input_grad[:4]
    if grad is None:
        return [None] * 4
    if torch.is_grad_enabled():  # the gradient is to be differentiated itself
        own = _views(tensors)
        y = by_layers(own[0], own[1], own[2], own[3], own[4], ctx.network)
        wanted = [t for t, n in zip(own, need, strict=False) if n]
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
        return [next(found) if n else None for n in need]
    grads = hyper_mlp_backward(grad, *tensors, preactivations, ctx.network, need)
    return [g if n else None for g, n in zip(grads, need, strict=True)]


class _HyperMlp(torch.autograd.Function):
    """What ``register_autograd`` makes of the same rule takes 50 us more a call."""

    @staticmethod
    def forward(ctx, x, h, weight, bias, task_ids, network):
        rows, (tasks, features) = x.shape[:-1].numel(), h.shape
        keep = not x.is_cpu or cpu.keeps(
            network, x.dtype, task_ids is not None, tasks, rows, features
        )
        with torch._C._AutoDispatchBelowAutograd():
            y, kept = hyper_mlp(x, h, weight, bias, task_ids, network, keep)
        ctx.save_for_backward(x, h, weight, bias, task_ids, kept)
        ctx.network = network
        return y

    @staticmethod
    def backward(ctx, grad):
        return *_gradients(ctx, grad), None, None


def stored_layer(
    weight: Tensor, scales_and_biases: Tensor | None, net: Network, n: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Matrix ``(B, out, in)`` and bias ``(B, out)`` of layer ``n`` of given networks, as they are
    applied: widened to ``dtype`` where they are steps of their scales, and transformed."""
    layer, scaled = net.layers[n], scales_and_biases is not None
    place, out = net.places(scaled)[n], layer.out_features
    w = weight[:, place.matrix :][:, : layer.weight_numel].unflatten(1, (out, layer.in_features))
    vectors = weight if scales_and_biases is None else scales_and_biases
    if scales_and_biases is not None:
        w = w.to(dtype) * scales_and_biases[:, place.scale :][:, :out].unsqueeze(2)
    if layer.transform:
        w = TRANSFORMS[layer.transform].value(w)
    return w, vectors[:, place.bias :][:, :out] if layer.bias == "b" else None


def by_task_layers(
    x: Tensor,
    weight: Tensor,
    scales_and_biases: Tensor | None,
    task_ids: Tensor | None,
    network: str,
    task_linear: Callable[..., Tensor] = task_linear,
    keep: list[Tensor] | None = None,
) -> Tensor:
    """What ``task_mlp`` means: layer after layer, differentiable to any order."""
    net = Network.for_kernels(network)

    def linear(n: int, x: Tensor) -> Tensor:
        return task_linear(x, *stored_layer(weight, scales_and_biases, net, n, x.dtype), task_ids)

    linears = (partial(linear, n) for n in range(len(net.layers)))
    return run_layers(x, linears, (v.activate for v in net.layers), keep)


def _check_stored(
    rows: list[Tensor],
    weight: Tensor,
    scales_and_biases: Tensor | None,
    task_ids: Tensor | None,
    network: str,
) -> Network:
    net, scaled = Network.for_kernels(network), scales_and_biases is not None
    stored = [t for t in (weight, scales_and_biases) if t is not None]
    checks.check_rows_match(rows, stored, len(weight), task_ids)
    checks.check_in_range(task_ids, len(weight))
    for name, t, width in (
        ("x", rows[-1], net.sizes[0]),
        ("weight", weight, net.weight_numel if scaled else net.numel),
        ("scales_and_biases", scales_and_biases, net.vector_numel),
        *([("grad", rows[0], net.sizes[-1])] if len(rows) > 1 else []),
    ):
        if t is not None and t.shape[-1] != width:
            raise ValueError(f"{name} must have {width} columns, got {checks.shape(t)}")
    return net


def _task_mlp(x, weight, scales_and_biases, task_ids, network):
    net = _check_stored([x], weight, scales_and_biases, task_ids, network)
    if scales_and_biases is None or task_ids is None:
        return by_task_layers(x, weight, scales_and_biases, task_ids, network).contiguous()
    # Steps of int8 are widened a block of touched tasks at a time, so that they stay in cache.
    y = x.new_empty(len(x), net.sizes[-1])
    for tasks, where, local in blocks(task_ids, max(1, BLOCK // net.weight_numel)):
        some = weight.index_select(0, tasks), scales_and_biases.index_select(0, tasks)
        y[where] = by_task_layers(x[where], *some, local, network)
    return y


def _task_mlp_backward(grad, x, weight, task_ids, network, output_mask):
    net = _check_stored([grad, x], weight, None, task_ids, network)
    pres: list[Tensor] = []
    by_task_layers(x, weight, None, task_ids, network, keep=pres)
    inputs = [x, *(v.activate(pre) for v, pre in zip(net.layers[:-1], pres, strict=False))]
    grads = []
    for n, layer in reversed(list(enumerate(net.layers))):
        grad = grad * layer.slope(pres[n])
        matrix, _ = stored_layer(weight, None, net, n, x.dtype)
        if output_mask[1]:
            if layer.bias == "b":
                grads.append(reference.sum_rows(grad, task_ids, len(weight)))
            of_matrix = task_linear_grad_weight(grad, inputs[n], task_ids, len(weight))
            if layer.transform:
                stored = weight[:, layer.begin :][:, : layer.weight_numel].view_as(of_matrix)
                of_matrix = of_matrix * TRANSFORMS[layer.transform].slope(stored)
            grads.append(of_matrix.flatten(1))
        if n > 0 or output_mask[0]:
            grad = task_linear(grad, matrix.mT, None, task_ids)
    return (
        grad.contiguous() if output_mask[0] else x.new_empty(0),
        torch.cat(grads[::-1], 1) if output_mask[1] else x.new_empty(0),
    )


def _task_mlp_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.network = inputs[4]


def _task_mlp_autograd(ctx, grad):
    need = ctx.needs_input_grad[:3]
    x, weight, scales, ids = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    if scales is None and not create_graph and not torch._C._are_functorch_transforms_active():
        found = iter(task_mlp_backward(grad, x, weight, ids, ctx.network, need[:2]))
        return *[g if n else None for g, n in zip(found, need, strict=False)], None, None, None
    with torch.enable_grad():
        tensors = _views(ctx.saved_tensors)
        y = by_task_layers(tensors[0], tensors[1], tensors[2], tensors[3], ctx.network)
    wanted = [t for t, n in zip(tensors, need, strict=False) if n]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=create_graph))
    return *[next(found) if n else None for n in need], None, None


def _applied(x: Tensor, network: str) -> int:
    """Multiply-adds of rows with matrices."""
    layers = Network.parse(network).layers
    return x.shape[:-1].numel() * sum(v.weight_numel for v in layers)


hyper_mlp = define(
    "hyper_mlp",
    "(Tensor x, Tensor h, Tensor weight, Tensor? bias, Tensor? task_ids, str network, bool keep)"
    " -> (Tensor, Tensor)",
    ((ROW, TASK, SHARED, SHARED, IDS), (ROW, ROW)),
    _hyper_mlp,
    _hyper_mlp_fake,
)
differentiate(hyper_mlp, _hyper_mlp_autograd, _hyper_mlp_setup)
count_flops(
    hyper_mlp,
    lambda x, h, weight, bias, ids, network, keep: (
        h.shape[0] * weight.numel() + _applied(x, network)
    ),
)

hyper_mlp_backward = define(
    "hyper_mlp_backward",
    "(Tensor grad, Tensor x, Tensor h, Tensor weight, Tensor? bias, Tensor? task_ids,"
    " Tensor preactivations, str network, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
    ((ROW, ROW, TASK, SHARED, SHARED, IDS, ROW), (ROW, TASK, SHARED, SHARED)),
    _hyper_mlp_backward,
    _hyper_mlp_backward_fake,
)
count_flops(  # of three products of a layer each: the weights' gradient serves those of h and head
    hyper_mlp_backward,
    lambda grad, x, h, weight, bias, ids, pre, network, mask: (
        (1 + mask[1] + mask[2]) * h.shape[0] * weight.numel() + 2 * _applied(x, network)
    ),
)

task_mlp = define(
    "task_mlp",
    "(Tensor x, Tensor weight, Tensor? scales_and_biases, Tensor? task_ids, str network) -> Tensor",
    ((ROW, TASK, TASK, IDS), (ROW,)),
    _task_mlp,
    lambda x, *rest: x.new_empty(*x.shape[:-1], Network.for_kernels(rest[3]).sizes[-1]),
)
differentiate(task_mlp, _task_mlp_autograd, _task_mlp_setup)
count_flops(task_mlp, lambda x, weight, scales, ids, network: _applied(x, network))

task_mlp_backward = define(
    "task_mlp_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? task_ids, str network, bool[2] output_mask)"
    " -> (Tensor, Tensor)",
    ((ROW, ROW, TASK, IDS), (ROW, TASK)),
    _task_mlp_backward,
    lambda grad, x, weight, ids, network, mask: tuple(
        x.new_empty(t.shape if wanted else (0,))
        for t, wanted in zip((x, weight), mask, strict=True)
    ),
)
count_flops(  # the layers once more, and back through them
    task_mlp_backward,
    lambda grad, x, weight, ids, network, mask: (2 + mask[1]) * _applied(x, network),
)


def run(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    task_ids: Tensor | None,
    network: str,
) -> Tensor:
    """``hyper_mlp`` as autograd needs it: pre-activations are kept only for a backward pass."""
    args = (x, h, weight, bias, task_ids, network)
    if torch.compiler.is_compiling():
        return hyper_mlp(*args, torch.is_grad_enabled())[0]
    if (
        torch.is_grad_enabled()
        and not torch._C._get_tracing_state()  # a trace holds ops, and no Function of Python
        and (
            x.requires_grad
            or h.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
        )
    ):
        # Function.apply asks for functorch's transforms first, which the caller has done: 5 us.
        return super(torch.autograd.Function, _HyperMlp).apply(*args)
    with torch._C._AutoDispatchBelowAutograd():  # its layer in Python takes 5 us to do nothing
        return hyper_mlp(*args, False)[0]
