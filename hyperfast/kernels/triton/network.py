"""A generated network: in one kernel where its widths fit, rows are many and no weight is
transformed, else by its layers.

In the kernel a program takes a block of rows through all layers, so that a hidden layer is stored
only where the backward pass will ask for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperfast.kernels.triton import generated, launch
from hyperfast.kernels.triton.activation import NOTHING, Finish, finish, followed
from hyperfast.kernels.triton.launch import (
    Config,
    Rows,
    agree,
    deep,
    entry,
    expect,
    power,
    tile,
    up,
)
from hyperfast.kernels.triton.parts import in_parts, load
from hyperfast.kernels.triton.trilinear import generate, groups, product, wide
from hyperfast.layout import Network, of_layer
from hyperfast.plans import gpu
from hyperfast.plans.sizes import Sizes


@triton.jit
def _layer(
    v, x_row, h_row, part_row, weight, made, bias, live, K, FILLED, x_i, h_k, part_step, part_k,
    w_p, w_k, made_step, made_p, made_k, bias_p,
    I: tl.constexpr, O: tl.constexpr, BEGIN: tl.constexpr, FIRST: tl.constexpr,
    TARGET_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr,
    G: tl.constexpr, FULL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The sums of one layer: ``sum_ik V[o,i,k] v[r,i] h[r,k]``, and what is linear and constant.
    Columns of ``v`` past ``I`` meet weights of 0. ``made`` are the weights ``V`` in parts."""
    i, o = tl.arange(0, BI), tl.arange(0, BO)
    total = tl.zeros((BM, BO // G, G), SUM)
    step = tl.cast(made_p, tl.int64)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        mask = live[:, None] & (k < K)[None, :]
        h1, h2, h3 = load(
            part_row + k[None, :].to(tl.int64) * part_k, part_step, mask, PARTS, False
        )
        total = generate(
            total, h1, h2, h3, v, made + BEGIN * step, made_step, 0, k0, I, FILLED, O, I * step,
            step, made_k, PARTS, PRECISION, BI, BK, FULL, I < BI, False, INDEX,
        )  # fmt: skip
    total = tl.reshape(total, (BM, BO))
    step = tl.cast(w_p, tl.int64)
    if TARGET_BIAS:
        biases = weight + (BEGIN + O * I) * step
        total = product(total, h_row, biases, live, o, K, O, h_k, w_p, w_k, PRECISION, BL)
    if HAS_BIAS:
        step = tl.cast(bias_p, tl.int64)
        shared = bias + BEGIN * step
        if FIRST:
            total = product(total, x_row, shared, live, o, I, O, x_i, I * step, step, PRECISION, 16)
        else:
            held = (o < O)[:, None] & (i < I)[None, :]
            shared = tl.load(shared + (o[:, None] * I + i[None, :]) * step, held, 0.0)
            made = tl.dot(shared, tl.trans(v), input_precision=PRECISION, out_dtype=SUM)
            total += tl.trans(made)
        if TARGET_BIAS:
            constant = tl.load(bias + (BEGIN + O * I + o) * step, o < O, 0.0)
            total += constant.to(SUM)[None, :]
    return total


@triton.jit
def _finish(
    total, pre, at, mask,
    ACTIVATIONS: tl.constexpr, PARAMETERS: tl.constexpr, N: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """What follows layer ``N``. Triton 3.6 passes no string on but from a name."""
    NAME: tl.constexpr = ACTIVATIONS[N]
    return finish(total, pre, at, mask, NAME, PARAMETERS[N], KEEP, False)


@triton.jit(do_not_specialize=["rows", "per_task"])
def _hyper_mlp(
    x, h, h_parts, weight, made, bias, keys, preactivations, y, rows, per_task, K, FILLED,
    x_r, x_i, h_t, h_k, part_step, part_t, part_k, w_p, w_k, made_step, made_p, made_k, bias_p,
    SIZES: tl.constexpr, TILES: tl.constexpr, BEGINS: tl.constexpr, GROUPS: tl.constexpr,
    ACTIVATIONS: tl.constexpr, PARAMETERS: tl.constexpr, KEPT: tl.constexpr, AT: tl.constexpr,
    TARGET_BIASES: tl.constexpr, HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
    FULL: tl.constexpr, INDEX: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """``BM`` rows through a network; the arguments of the first ``KEPT`` activations are stored,
    those of layer ``n`` after ``AT[n]`` for each row."""
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = r < rows
    task = entry(r, keys, per_task, live, True, RAGGED)
    h_row, part_row = (h + task * h_t)[:, None], (h_parts + task * part_t)[:, None]
    x_row = (x + r * x_r)[:, None]
    i = tl.arange(0, TILES[0])
    v = tl.load(x_row + i[None, :].to(tl.int64) * x_i, live[:, None] & (i < SIZES[0])[None, :], 0.0)
    for n in tl.static_range(len(GROUPS)):
        total = _layer(
            v, x_row, h_row, part_row, weight, made, bias, live, K, FILLED, x_i, h_k,
            part_step, part_k, w_p, w_k, made_step, made_p, made_k, bias_p,
            SIZES[n], SIZES[n + 1], BEGINS[n], n == 0, TARGET_BIASES[n], HAS_BIAS,
            SUM, PRECISION, PARTS, BM, TILES[n], TILES[n + 1], BK, BL, GROUPS[n], FULL[n], INDEX,
        )  # fmt: skip
        o = tl.arange(0, TILES[n + 1])
        at = r[:, None] * SIZES[n + 1] + o[None, :]
        mask = live[:, None] & (o < SIZES[n + 1])[None, :]
        pre = preactivations + tl.cast(rows, tl.int64) * AT[n]
        total = _finish(total, pre, at, mask, ACTIVATIONS, PARAMETERS, n, n < KEPT)
        v = total.to(y.dtype.element_ty)
        if SIZES[n + 1] < TILES[n + 1]:  # past the outputs may be infinity times 0
            v = tl.where((o < SIZES[n + 1])[None, :], v, 0.0)
    tl.store(y + at, v, mask)


# Largest tile first; columns are the most that a layer may have. Beside a layer's inputs and sums,
# 128 registers hold a product of 64 columns.
WHOLE = {
    "half": (
        Config(128, 64, 64, 8, 3, 64, 128),
        Config(64, 64, 64, 4, 3, 64),
        Config(32, 64, 64, 4, 3, 64),
    ),
    "bf16x6": (Config(64, 64, 32, 4), Config(32, 64, 64, 4, 2)),
    "tf32": (Config(64, 64, 32, 4, 2), Config(32, 64, 32, 4, 2)),
    "fp32": (Config(64, 64, 16, 8, 2),),
    "fp64": (Config(32, 64, 16, 8, 2),),
}
WHOLE["bf16x3"] = WHOLE["bf16x6"]
WHOLE["bf16x1"] = WHOLE["half"][1:]  # beside inputs of fp32, 128 registers spill


def hyper_mlp(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    task_ids: Tensor | None,
    network: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    net = Network.for_kernels(network)
    rows = _checked([x], h, weight, bias, task_ids, net)
    then = followed(net)
    widths = net.kept if keep else []
    preactivations = x.new_empty(rows.total * sum(widths))
    y = x.reshape(-1, net.sizes[0])
    sizes = tuple(
        Sizes(
            *(rows.tasks, rows.total, v.in_features, v.out_features, h.shape[1]),
            *(rows.ragged, bool(v.bias), bool(v.transform)),
        )
        for v in net.layers
    )
    if gpu.one_kernel(sizes, h.element_size(), gpu.arithmetic(h.dtype)):
        y = _whole(y, h, weight, bias, rows, sizes, then, preactivations, len(widths))
    else:
        for n, pre in enumerate(_split(preactivations, widths, rows)):
            then[n] = then[n]._replace(pre=pre)
        for layer, follows in zip(net.layers, then, strict=True):
            made = of_layer(weight, bias, layer)
            y = generated.forward(y, h, made, rows, layer.transform, then=follows)
    return y.view(*x.shape[:-1], net.sizes[-1]), preactivations


def hyper_mlp_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    task_ids: Tensor | None,
    preactivations: Tensor,
    network: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    net = Network.for_kernels(network)
    rows = _checked([grad, x], h, weight, bias, task_ids, net)
    if net.kept and not preactivations.numel():  # they were not kept
        preactivations = hyper_mlp(x, h, weight, bias, task_ids, network, True)[1]
    agree(x=x, grad=grad, preactivations=preactivations)
    expect(grad, "grad", (*x.shape[:-1], net.sizes[-1]))
    expect(preactivations, "preactivations", (rows.total * sum(net.kept),))
    pres, then = _split(preactivations, net.kept, rows), followed(net)
    of_x, of_h, *_ = output_mask
    nothing = x.new_empty(0)
    inputs = [x.reshape(-1, net.sizes[0])]
    inputs += [f.by_torch(pre) for f, pre in zip(then[:-1], pres, strict=False)]
    grad = grad.reshape(-1, net.sizes[-1])
    if len(pres) == len(then):
        grad = then[-1].backward(pres[-1]).by_torch(grad)
    grad_h, weights, biases = nothing, [], []
    for n, layer in reversed(list(enumerate(net.layers))):
        made = of_layer(weight, bias, layer)
        of_layer_h, of_rows, of_shared = generated.backward(
            grad, inputs[n], h, made, rows, output_mask[1:], layer.transform
        )
        if of_h:  # lest 16-bit sums over the layers be rounded after each
            part = of_layer_h.to(torch.promote_types(h.dtype, torch.float32))
            grad_h = grad_h.add_(part) if grad_h.numel() else part
        weights.append(of_rows)
        biases.append(of_shared)
        if n or of_x:
            before = then[n - 1].backward(pres[n - 1]) if n else NOTHING
            grad = generated.forward(grad, h, made.transposed, rows, layer.transform, then=before)
    return (
        grad.view(x.shape) if of_x else nothing,
        grad_h.to(x.dtype),
        torch.cat(weights[::-1]),
        torch.cat(biases[::-1]),
    )


def _whole(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    layers: Sequence[Sizes],
    then: list[Finish],
    preactivations: Tensor,
    keep: int,
) -> Tensor:
    """``(R, out)``; the arguments of the first ``keep`` activations go to ``preactivations``."""
    sizes = (layers[0].in_features, *(layer.out_features for layer in layers))
    features = weight.shape[1]
    kind = gpu.products(x.dtype, 2 * rows.total * weight.numel(), weight.numel() + h.numel())
    parts = gpu.PARTS.get(kind, 0)
    if not parts:
        weight = wide(weight.unsqueeze(1), rows.total)[:, 0]
    made, h_parts = in_parts(weight, parts), in_parts(h, parts)
    tiles = tuple(power(size) if n == 0 else tile(size) for n, size in enumerate(sizes))
    b = weight if bias is None else bias
    y = x.new_empty(len(x), sizes[-1])
    table = WHOLE[kind]
    sines = any(f.name == "sin" for f in then)
    if sines:  # to reduce large arguments takes more registers than products do
        table = tuple(config._replace(registers=None) for config in table)

    def block(config: Config) -> int:
        return min(tile(rows.total), config.rows)

    def run(config: Config) -> None:
        depth = deep(features, config.depth)
        group = tuple(groups(o, i, o, config.width)[0] for i, o in pairwise(tiles))
        launch.start(
            _hyper_mlp, up(rows.total, block(config)),
            x, h, h_parts, weight, made, b, rows.keys, preactivations, y, rows.total,
            rows.per_task, features, made.shape[2], *x.stride(), *h.stride(), *h_parts.stride(),
            *weight.stride(), *made.stride(), b.stride(0),
            SIZES=sizes, TILES=tiles, GROUPS=group, INDEX=launch.index(made[0]),
            FULL=tuple(
                not (o % g or i % t or made.shape[2] % depth)
                for (i, o), g, t in zip(pairwise(sizes), group, tiles, strict=False)
            ),
            BEGINS=(0, *accumulate(layer.params for layer in layers[:-1])),
            ACTIVATIONS=tuple(f.name for f in then), PARAMETERS=tuple(f.parameter for f in then),
            KEPT=keep, AT=(0, *accumulate(sizes[1:-1])),
            TARGET_BIASES=tuple(layer.bias for layer in layers), HAS_BIAS=bias is not None,
            RAGGED=rows.ragged, **launch.arithmetic(x.dtype), PARTS=max(parts, 1),
            BM=block(config), BK=depth, BL=16 if parts else depth, **config.options(y.device),
        )  # fmt: skip

    key = ("network", kind, x.dtype, sizes, features, sines, launch.power(rows.total))
    launch.run(table, lambda c: up(rows.total, block(c)), run, key, x.device)
    return y


def _checked(
    rows: list[Tensor],
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    task_ids: Tensor | None,
    net: Network,
) -> Rows:
    agree(x=rows[-1], h=h, weight=weight, bias=bias)
    expect(weight, "weight", (net.numel, h.shape[1]))
    expect(bias, "bias", weight.shape[:1])
    expect(rows[-1], "x", (*rows[-1].shape[:-1], net.sizes[0]))
    return launch.rows_of(rows, [h], task_ids, len(h))


def _split(preactivations: Tensor, widths: list[int], rows: Rows) -> list[Tensor]:
    pieces = preactivations.split([rows.total * width for width in widths])
    return [piece.view(rows.total, width) for piece, width in zip(pieces, widths, strict=True)]
