"""Whole networks as one op: one crossing from Python, hidden layers that stay in a kernel.

``hyper_mlp`` generates and applies every layer of the target; ``task_mlp`` applies given weights.
A backend registers its kernels for its device's key; elsewhere the layers run one by one, through
the ops of :mod:`hyperfast.ops`. Derivatives beyond the first, and all transforms, go by the layers.

Arguments shared by the ops: ``sizes`` are the widths ``(in, hidden, ..., out)``; ``activations``
names what follows each layer, as :func:`hyperfast.activations.encode` writes it, and
:data:`hyperfast.activations.FORMULAS` says what it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from hyperfast import checks
from hyperfast.activations import Formula, decode
from hyperfast.kernels.rows import blocks
from hyperfast.layout import MLPSpec
from hyperfast.ops import layer as ops
from hyperfast.plans import choose as plan
from hyperfast.plans.choose import HAS_TRITON


class Layer(NamedTuple):
    """One layer of a network: its widths, its rows ``[begin, end)`` of the head, what follows."""

    ins: int
    out: int
    begin: int
    end: int
    formula: Formula
    parameter: float

    def activate(self, z: Tensor) -> Tensor:
        return self.formula.value(z, self.parameter)

    def slope(self, z: Tensor) -> Tensor:
        return self.formula.slope(z, self.parameter)


def layers_of(sizes: Sequence[int], target_bias: bool, activations: str) -> list[Layer]:
    """The layers of a network.

    Raises:
        ValueError: fewer than two widths, one below 1, or activations that are not one a layer.
    """
    formulas = decode(activations)
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must hold at least two widths above 0, got {list(sizes)}")
    if len(formulas) != len(sizes) - 1:
        raise ValueError(
            f"activations must name {len(sizes) - 1}, one a layer, got {activations!r}"
        )
    layers: list[Layer] = []
    begin = 0
    for (i, o), (formula, parameter) in zip(pairwise(sizes), formulas, strict=True):
        end = begin + o * (i + target_bias)
        layers.append(Layer(i, o, begin, end, formula, parameter))
        begin = end
    return layers


def kept(sizes: Sequence[int], activations: str) -> list[int]:
    """The widths of the pre-activations that the backward pass needs: of every layer but a last one
    that nothing follows. ``hidden`` holds them layer by layer, of each all rows."""
    return list(sizes[1:-1] if activations.split(",")[-1] == "identity" else sizes[1:])


def _check(rows, per_task, task_ids, weight, bias, sizes, target_bias, activations) -> list[Layer]:
    layers = layers_of(sizes, target_bias, activations)
    tasks = len(per_task[0])
    checks.fitting(rows, per_task, tasks, task_ids)
    checks.in_range(task_ids, tasks)
    params, features = layers[-1].end, per_task[0].shape[1]
    if weight.shape != (params, features):
        raise ValueError(f"weight must have shape {(params, features)}, got {checks.shape(weight)}")
    if bias is not None and bias.shape != (params,):
        raise ValueError(f"bias must have shape ({params},), got {checks.shape(bias)}")
    if rows[-1].shape[-1] != sizes[0]:
        raise ValueError(f"x must have {sizes[0]} columns, got {checks.shape(rows[-1])}")
    return layers


def _bias(bias: Tensor | None, layer: Layer) -> Tensor | None:
    return None if bias is None else bias[layer.begin : layer.end]


def by_layers(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    task_ids: Tensor | None,
    sizes: Sequence[int],
    target_bias: bool,
    activations: str,
) -> Tensor:
    """What ``hyper_mlp`` means: layer after layer, differentiable to any order."""
    for layer in layers_of(sizes, target_bias, activations):
        w, b = weight[layer.begin : layer.end], _bias(bias, layer)
        x = layer.activate(ops.hyper_linear(x, h, w, b, task_ids, target_bias, ""))
    return x


def _hyper_mlp(x, h, weight, bias, task_ids, sizes, target_bias, activations, keep):
    layers = _check([x], [h], task_ids, weight, bias, sizes, target_bias, activations)
    widths = kept(sizes, activations) if keep else []
    hidden = []
    for n, layer in enumerate(layers):
        w, b = weight[layer.begin : layer.end], _bias(bias, layer)
        z = ops.hyper_linear(x, h, w, b, task_ids, target_bias, "")
        if n < len(widths):
            hidden.append(z.flatten())
        x = layer.activate(z)
    return x.contiguous(), torch.cat(hidden) if hidden else x.new_empty(0)


def _hyper_mlp_backward(
    grad, x, h, weight, bias, task_ids, hidden, sizes, target_bias, activations, output_mask
):
    layers = _check([grad, x], [h], task_ids, weight, bias, sizes, target_bias, activations)
    rows = x.shape[:-1]
    widths = kept(sizes, activations)
    if widths and not hidden.numel():  # it was not kept
        hidden = _hyper_mlp(x, h, weight, bias, task_ids, sizes, target_bias, activations, True)[1]
    if hidden.shape != (rows.numel() * sum(widths),):
        raise ValueError(
            f"hidden must have shape ({rows.numel() * sum(widths)},), got {checks.shape(hidden)}"
        )
    pieces = hidden.split([rows.numel() * width for width in widths])
    z = [p.view(*rows, width) for p, width in zip(pieces, widths, strict=True)]
    inputs = [
        x,
        *(layer.activate(v) for layer, v in zip(layers, z[: len(layers) - 1], strict=False)),
    ]
    # Lest 16-bit sums over the layers be rounded after each.
    grad_h = torch.zeros_like(h, dtype=torch.promote_types(h.dtype, torch.float32))
    weights, biases = [], []
    for n, layer in reversed(list(enumerate(layers))):
        if n < len(z):
            grad = grad * layer.slope(z[n])
        w, b = weight[layer.begin : layer.end], _bias(bias, layer)
        if output_mask[1]:
            grad_h += ops.hyper_linear_grad_h(grad, inputs[n], w, task_ids, len(h), target_bias, "")
        if output_mask[2]:
            weights.append(
                ops.hyper_linear_grad_weight(grad, inputs[n], h, task_ids, target_bias, "")
            )
        if output_mask[3]:
            biases.append(ops._grad_shared(grad, inputs[n], target_bias))
        if n > 0 or output_mask[0]:
            m = layer.out * layer.ins
            shared = None if b is None else b[:m]
            grad = ops.hyper_linear_grad_x(grad, h, w[:m], shared, task_ids, "")
    return (
        grad if output_mask[0] else x.new_empty(0),
        grad_h.to(h.dtype) if output_mask[1] else x.new_empty(0),
        torch.cat(weights[::-1]) if output_mask[2] else x.new_empty(0),
        torch.cat(biases[::-1]) if output_mask[3] else x.new_empty(0),
    )


def _hyper_mlp_fake(x, h, weight, bias, task_ids, sizes, target_bias, activations, keep):
    rows = x.shape[:-1]
    count = math.prod(rows) * sum(kept(sizes, activations)) if keep else 0
    return x.new_empty(*rows, sizes[-1]), x.new_empty(count)


def _hyper_mlp_backward_fake(grad, x, h, weight, bias, *rest):
    shapes = (x.shape, h.shape, weight.shape, weight.shape[:1])
    return tuple(
        x.new_empty(shape if wanted else (0,))
        for shape, wanted in zip(shapes, rest[-1], strict=True)
    )


def _hyper_mlp_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.options = inputs[5:8]
    ctx.set_materialize_grads(False)


def _hyper_mlp_autograd(ctx, grad, _):
    return *_gradients(ctx, grad), *[None] * 5


def _apart(tensors):
    """Views, so that a gradient with respect to one argument does not run through another that was
    computed from it: the engine adds that path itself."""
    return [None if t is None else t.view_as(t) for t in tensors]


def _gradients(ctx, grad):
    """Gradients of x, h, weight and bias."""
    *tensors, hidden = ctx.saved_tensors
    need = ctx.needs_input_grad[:4]
    if grad is None:
        return [None] * 4
    if torch.is_grad_enabled():  # the gradient is to be differentiated itself
        own = _apart(tensors)
        y = by_layers(*own, *ctx.options)
        wanted = [t for t, n in zip(own, need, strict=False) if n]
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
        return [next(found) if n else None for n in need]
    grads = hyper_mlp_backward(grad, *tensors, hidden, *ctx.options, need)
    return [g if n else None for g, n in zip(grads, need, strict=True)]


class _HyperMlp(torch.autograd.Function):
    """What ``register_autograd`` makes of the same rule takes 50 us more a call."""

    @staticmethod
    def forward(ctx, *args):
        x, h, weight = args[:3]
        rows, tasks = x.shape[:-1].numel(), h.shape[0]
        params, features = weight.shape
        again = x.is_cpu and plan.recomputes(tasks, rows, params, features, x.itemsize)
        with torch._C._AutoDispatchBelowAutograd():
            y, hidden = hyper_mlp(*args, not again)
        ctx.save_for_backward(*args[:5], hidden)
        ctx.options = args[5:]
        return y

    @staticmethod
    def backward(ctx, grad):
        return *_gradients(ctx, grad), *[None] * 4


def _stored(weight, affine, sizes, target_bias, activations, dtype):
    """Weight, bias and :class:`Layer` of each layer of given networks."""
    begin = first = 0
    for layer in layers_of(sizes, target_bias, activations):
        end = begin + layer.ins * layer.out
        w = weight[:, begin:end].unflatten(1, (layer.out, layer.ins))
        if affine is None:
            bias = weight[:, end : end + layer.out] if target_bias else None
            begin = end + layer.out * target_bias
        else:
            w = w.to(dtype) * affine[:, first : first + layer.out].unsqueeze(2)
            first += layer.out
            bias = affine[:, first : first + layer.out] if target_bias else None
            first += layer.out * target_bias
            begin = end
        yield w, bias, layer


def by_task_layers(
    x, weight, affine, task_ids, sizes, target_bias, activations, linear=ops.task_linear
) -> Tensor:
    """What ``task_mlp`` means: layer after layer, differentiable to any order."""
    for w, b, layer in _stored(weight, affine, sizes, target_bias, activations, x.dtype):
        x = layer.activate(linear(x, w, b, task_ids))
    return x


def _task_mlp(x, weight, affine, task_ids, sizes, target_bias, activations):
    layers = layers_of(sizes, target_bias, activations)
    matrices, biases = sum(v.ins * v.out for v in layers), target_bias * sum(sizes[1:])
    checks.fitting([x], [weight] if affine is None else [weight, affine], len(weight), task_ids)
    checks.in_range(task_ids, len(weight))
    for name, t, width in (
        ("x", x, sizes[0]),
        ("weight", weight, matrices + (biases if affine is None else 0)),
        ("affine", affine, biases + sum(sizes[1:])),
    ):
        if t is not None and t.shape[-1] != width:
            raise ValueError(f"{name} must have {width} columns, got {checks.shape(t)}")
    options = sizes, target_bias, activations
    if affine is None or task_ids is None:
        return by_task_layers(x, weight, affine, task_ids, *options).contiguous()
    # Steps of int8 are widened a block of touched tasks at a time, so that they stay in cache.
    y = x.new_empty(len(x), sizes[-1])
    for tasks, where, local in blocks(task_ids, max(1, plan.BLOCK // matrices)):
        some = weight.index_select(0, tasks), affine.index_select(0, tasks)
        y[where] = by_task_layers(x[where], *some, local, *options)
    return y


def _task_mlp_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _task_mlp_autograd(ctx, grad):
    need = ctx.needs_input_grad[:3]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        tensors = _apart(ctx.saved_tensors)
        y = by_task_layers(*tensors, *ctx.options)
    wanted = [t for t, n in zip(tensors, need, strict=False) if n]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=create_graph))
    return *[next(found) if n else None for n in need], *[None] * 4


def _define(
    name: str,
    schema: str,
    kernel: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup: Callable | None = None,
):
    torch.library.define(f"hyperfast::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"hyperfast::{name}", "CompositeExplicitAutograd", kernel)
    if HAS_TRITON:
        torch.library.impl(f"hyperfast::{name}", "CUDA", ops._triton(name))
    op = getattr(torch.ops.hyperfast, name).default
    torch.library.register_fake(op, fake)
    if backward is not None:
        torch.library.register_autograd(op, backward, setup_context=setup)
    return op


hyper_mlp = _define(
    "hyper_mlp",
    "(Tensor x, Tensor h, Tensor weight, Tensor? bias, Tensor? task_ids, int[] sizes,"
    " bool target_bias, str activations, bool keep) -> (Tensor, Tensor)",
    _hyper_mlp,
    _hyper_mlp_fake,
    _hyper_mlp_autograd,
    _hyper_mlp_setup,
)

hyper_mlp_backward = _define(
    "hyper_mlp_backward",
    "(Tensor grad, Tensor x, Tensor h, Tensor weight, Tensor? bias, Tensor? task_ids,"
    " Tensor hidden, int[] sizes, bool target_bias, str activations, bool[4] output_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _hyper_mlp_backward,
    _hyper_mlp_backward_fake,
)

task_mlp = _define(
    "task_mlp",
    "(Tensor x, Tensor weight, Tensor? affine, Tensor? task_ids, int[] sizes, bool target_bias,"
    " str activations) -> Tensor",
    _task_mlp,
    lambda x, *rest: x.new_empty(*x.shape[:-1], rest[3][-1]),
    _task_mlp_autograd,
    _task_mlp_setup,
)


def run(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    task_ids: Tensor | None,
    spec: MLPSpec,
    activations: str,
) -> Tensor:
    """``hyper_mlp`` as autograd needs it: pre-activations are kept only for a backward pass."""
    args = (x, h, weight, bias, task_ids, spec.sizes, spec.bias, activations)
    if torch.compiler.is_compiling():
        return hyper_mlp(*args, torch.is_grad_enabled())[0]
    if torch.is_grad_enabled() and (
        x.requires_grad
        or h.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        # Function.apply asks for functorch's transforms first, which the caller has done: 5 us.
        return super(torch.autograd.Function, _HyperMlp).apply(*args)
    with torch._C._AutoDispatchBelowAutograd():  # its layer in Python takes 5 us to do nothing
        return hyper_mlp(*args, False)[0]
