"""Generated networks with the trunk before them, from latents to outputs in one op of the CPU.

A trunk of linear layers and activations is a network that all tasks share; ``layers`` is its text,
and ``trunk`` holds its matrices and biases, layer by layer. Where there is no such kernel, and for
derivatives beyond the first, the trunk runs in plain PyTorch before :func:`hyper_mlp`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperfast.layout import Network
from hyperfast.ops.define import count_flops, define_for_cpu
from hyperfast.ops.network import _hyper_mlp_fake, by_layers
from hyperfast.ops.recorded import gradients, wanted_by_autograd
from hyperfast.plans import cpu

GIVEN = "Tensor x, Tensor z, Tensor[] trunk, Tensor weight, Tensor? bias, Tensor? task_ids"


def features(z: Tensor, trunk: Sequence[Tensor], layers: str) -> Tensor:
    """What the trunk makes of latents ``z (B, z_dim)``: ``h (B, K)``."""
    tensors = iter(trunk)
    for layer in Network.for_kernels(layers).layers:
        z = F.linear(z, next(tensors), next(tensors) if layer.bias else None)
        z = layer.activate(z)
    return z


def _fake(x, z, trunk, weight, bias, task_ids, layers, network, keep):
    h = z.new_empty(z.shape[0], weight.shape[1])
    y, kept = _hyper_mlp_fake(x, h, weight, bias, task_ids, network, keep)
    return y, h, kept


def _backward_fake(grad, x, z, trunk, weight, bias, task_ids, h, kept, layers, network, mask):
    """Gradients of x, z, weight, bias and the trunk; empty where they are not wanted."""
    given = (x, mask[0]), (z, mask[1]), (weight, mask[3]), (weight[:, 0], mask[4])
    of_all = *given, *((t, mask[2]) for t in trunk)
    return [x.new_empty(t.shape if wanted else (0,)) for t, wanted in of_all]


trunk_mlp = define_for_cpu(
    "trunk_mlp",
    f"({GIVEN}, str layers, str network, bool keep) -> (Tensor, Tensor, Tensor)",
    _fake,
)
trunk_mlp_backward = define_for_cpu(
    "trunk_mlp_backward",
    f"(Tensor grad, {GIVEN}, Tensor h, Tensor preactivations, str layers, str network,"
    " bool[5] output_mask) -> Tensor[]",
    _backward_fake,
)


def _flops(x, z, trunk, weight, bias, task_ids, layers, network, keep):
    rows, net = x.shape[:-1].numel(), Network.parse(network)
    made = weight.numel() + Network.parse(layers).weight_numel
    return z.shape[0] * made + rows * net.weight_numel


def _backward_flops(grad, x, z, trunk, weight, bias, ids, h, kept, layers, network, mask):
    rows, net = x.shape[:-1].numel(), Network.parse(network)
    of_head = 1 + (mask[1] or mask[2]) + mask[3]
    of_trunk = (1 + mask[1] + mask[2]) * Network.parse(layers).weight_numel
    return z.shape[0] * (of_head * weight.numel() + of_trunk) + 2 * rows * net.weight_numel


count_flops(trunk_mlp, _flops)
count_flops(trunk_mlp_backward, _backward_flops)


class _TrunkMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layers, network, x, z, weight, bias, task_ids, *trunk):
        rows, (tasks, width) = x.shape[:-1].numel(), (z.shape[0], weight.shape[1])
        keep = cpu.keeps(network, x.dtype, task_ids is not None, tasks, rows, width)
        with torch._C._AutoDispatchBelowAutograd():
            y, h, kept = trunk_mlp(x, z, trunk, weight, bias, task_ids, layers, network, keep)
        ctx.save_for_backward(x, z, weight, bias, task_ids, h, kept, *trunk)
        ctx.texts = layers, network
        return y

    @staticmethod
    def backward(ctx, grad):
        _, _, of_x, of_z, of_weight, of_bias, _, *need = ctx.needs_input_grad
        x, z, weight, bias, ids, h, kept, *trunk = ctx.saved_tensors
        layers, network = ctx.texts
        if wanted_by_autograd([grad]):

            def run(x, z, weight, bias, *trunk):
                h = features(z, trunk, layers)
                return [by_layers(x, h, weight, bias, ids, network)]

            found = gradients(run, (x, z, weight, bias, *trunk), [grad])
            return None, None, *found[:4], None, *found[4:]
        mask = [of_x, of_z, any(need), of_weight, of_bias]
        with torch._C._AutoDispatchBelowAutograd():
            dx, dz, dw, db, *made = trunk_mlp_backward(
                grad, x, z, trunk, weight, bias, ids, h, kept, layers, network, mask
            )
        return (
            None,
            None,
            dx if of_x else None,
            dz if of_z else None,
            dw if of_weight else None,
            db if of_bias else None,
            None,
            *(t if n else None for t, n in zip(made, need, strict=True)),
        )


def run(
    x: Tensor,
    z: Tensor,
    trunk: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    task_ids: Tensor | None,
    layers: str,
    network: str,
) -> Tensor:
    """The op as autograd needs it; the caller has asked for transforms and compilers."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or z.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or any(t.requires_grad for t in trunk)
    ):
        # Function.apply asks for functorch's transforms first, which the caller has done: 5 us.
        return super(torch.autograd.Function, _TrunkMlp).apply(
            layers, network, x, z, weight, bias, task_ids, *trunk
        )
    with torch._C._AutoDispatchBelowAutograd():
        return trunk_mlp(x, z, trunk, weight, bias, task_ids, layers, network, False)[0]
