"""Given networks on the rows of their tasks: in one kernel where the widths fit, else by layers.

Mixed rows are put in the order of their tasks once, where that pays (see grouped.py): every touched
weight is read from memory once, and again from the cache at most.
Steps of int8 are widened, and weights transformed, in registers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import triton
import triton.language as tl
from torch import Tensor

from hyperfast.kernels.triton import grouped, launch
from hyperfast.kernels.triton.activation import NOTHING, activate, followed
from hyperfast.kernels.triton.grouped import row, stretch, transformed
from hyperfast.kernels.triton.launch import Rows, agree, expect, power, rows_of, tile
from hyperfast.layout import Layer, Network
from hyperfast.plans import gpu


@triton.jit
def _matrix(
    matrices, own, w_p, v_p, I: tl.constexpr, O: tl.constexpr, BEGIN: tl.constexpr,
    SCALE: tl.constexpr, TRANSFORM: tl.constexpr, SCALED: tl.constexpr, SUM: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """The matrix of one layer ``(BO, BI)``, transformed, and the scales of its outputs."""
    i, o = tl.arange(0, BI), tl.arange(0, BO)
    held = (o < O)[:, None] & (i < I)[None, :]
    w = tl.load(matrices + (BEGIN + o[:, None] * I + i[None, :]).to(tl.int64) * w_p, held, 0.0)
    scale = o
    if SCALED:
        scale = tl.load(own + (SCALE + o).to(tl.int64) * v_p, o < O, 0.0)
    if TRANSFORM != "":  # what lies past the inputs meets weights of 0
        w = tl.where(held, transformed(w, scale, SCALED, TRANSFORM, SUM), 0.0)
    return w, scale


@triton.jit(do_not_specialize=["rows", "per_task"])
def _task_mlp(
    x, weight, vectors, keys, order, y, rows, per_task, x_r, x_i, w_t, w_p, v_t, v_p,
    SIZES: tl.constexpr, TILES: tl.constexpr, WEIGHTS: tl.constexpr, SCALES: tl.constexpr,
    BIASES: tl.constexpr, ACTIVATIONS: tl.constexpr, PARAMETERS: tl.constexpr,
    TRANSFORMS: tl.constexpr, SCALED: tl.constexpr, RAGGED: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
    HELD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """A stretch of the rows of one task, ``BM`` at a time, through its network.

    Of the task's row of ``weight`` the matrix of layer ``n`` begins at ``WEIGHTS[n]``; its bias, if
    it has one, at ``BIASES[n]`` of ``vectors``. ``HELD`` matrices stay in registers from one row to
    the next.
    """
    pid = tl.program_id(0).to(tl.int64)
    task, first, last = stretch(pid, keys, rows, per_task, RAGGED, ROWS)
    if first == last:
        return
    LAST: tl.constexpr = len(ACTIVATIONS)
    # The weights of all layers lie in one piece, whose length is seldom a multiple of 16.
    matrices = weight + tl.multiple_of(task * w_t, ALIGNED)
    own = vectors + task * v_t
    held = ()
    if HELD:
        for n in tl.static_range(LAST):
            held += (  # type: ignore[assignment]
                _matrix(
                    matrices, own, w_p, v_p, SIZES[n], SIZES[n + 1], WEIGHTS[n], SCALES[n],
                    tl.constexpr(TRANSFORMS[n]), SCALED, SUM, TILES[n], TILES[n + 1],
                ),
            )  # fmt: skip
    begin, end = tl.arange(0, TILES[0]), tl.arange(0, TILES[LAST])
    for p0 in range(first, last, BM):
        p = p0 + tl.arange(0, BM)
        live = p < last
        r = row(p, live, order, RAGGED, ROWS)
        v = tl.load(
            x + r[:, None] * x_r + begin[None, :].to(tl.int64) * x_i,
            live[:, None] & (begin < SIZES[0])[None, :],
            0.0,
        )
        for n in tl.static_range(LAST):
            if HELD:
                w, scale = held[n]  # type: ignore[var-annotated]
            else:
                w, scale = _matrix(
                    matrices, own, w_p, v_p, SIZES[n], SIZES[n + 1], WEIGHTS[n], SCALES[n],
                    tl.constexpr(TRANSFORMS[n]), SCALED, SUM, TILES[n], TILES[n + 1],
                )  # fmt: skip
            if BM == 1:  # memory-bound: no matrix unit, the widest loads
                total = tl.sum(w.to(SUM) * v.to(SUM), 1)[None, :]
            else:
                w = w.to(v.dtype)
                if SCALED or TRANSFORMS[n] != "":
                    total = tl.dot(v, tl.trans(w), input_precision=PRECISION, out_dtype=SUM)
                else:  # what was formed is the right operand
                    made = tl.dot(w, tl.trans(v), input_precision=PRECISION, out_dtype=SUM)
                    total = tl.trans(made)
            if SCALED and TRANSFORMS[n] == "":
                total *= scale.to(SUM)[None, :]
            if BIASES[n] is not None:
                o = tl.arange(0, TILES[n + 1])
                bias = tl.load(own + (BIASES[n] + o).to(tl.int64) * v_p, o < SIZES[n + 1], 0.0)
                total += bias.to(SUM)[None, :]
            v = activate(total, tl.constexpr(ACTIVATIONS[n]), PARAMETERS[n]).to(y.dtype.element_ty)
            if SIZES[n + 1] < TILES[n + 1]:  # past the outputs may be infinity times 0
                v = tl.where((tl.arange(0, TILES[n + 1]) < SIZES[n + 1])[None, :], v, 0.0)
        mask = live[:, None] & (end < SIZES[LAST])[None, :]
        tl.store(y + r[:, None] * SIZES[LAST] + end[None, :], v, mask)


# Most rows of a program and its warps, where rows share tasks: none spills, as 16 rows of fp64 do.
TOGETHER = {"half": (64, 4), "tf32": (64, 8), "fp32": (16, 8), "fp64": (1, 4)}
# Most of them where weights are widened or transformed. Then both operands of a product are formed,
# and the left one is in registers: that is not safe on Hopper where a warp group multiplies (see
# trilinear.py), which takes 64 rows.
FORMED = 32


def task_mlp(
    x: Tensor,
    weight: Tensor,
    scales_and_biases: Tensor | None,
    task_ids: Tensor | None,
    network: str,
) -> Tensor:
    net = Network.for_kernels(network)
    tasks, scaled = len(weight), scales_and_biases is not None
    agree(x=x, **({"scales_and_biases": scales_and_biases} if scaled else {"weight": weight}))
    if weight.device != x.device:
        raise TypeError(f"weight must be on the device of x, {x.device}, got {weight.device}")
    expect(x, "x", (*x.shape[:-1], net.sizes[0]))
    expect(weight, "weight", (tasks, net.weight_numel if scaled else net.numel))
    expect(scales_and_biases, "scales_and_biases", (tasks, net.vector_numel))
    rows = rows_of([x], [weight], task_ids, tasks)
    flat = x.reshape(-1, net.sizes[0])
    whole = gpu.fits_one_kernel(net.sizes) and (scaled or not grouped.by_library(rows))
    y = (_whole if whole else _by_layers)(flat, weight, scales_and_biases, rows, net)
    return y.view(*x.shape[:-1], net.sizes[-1])


def task_mlp_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    task_ids: Tensor | None,
    network: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight``, layer by layer; the forward pass is made again."""
    net = Network.for_kernels(network)
    agree(x=x, grad=grad, weight=weight)
    expect(x, "x", (*x.shape[:-1], net.sizes[0]))
    expect(grad, "grad", (*x.shape[:-1], net.sizes[-1]))
    expect(weight, "weight", (len(weight), net.numel))
    rows = rows_of([grad, x], [weight], task_ids, len(weight))
    pieces, then = list(_pieces(weight, None, net)), followed(net)
    inputs, pres = [x.reshape(-1, net.sizes[0])], []
    for (layer, w, _, bias), follows in zip(pieces[: len(net.kept)], then, strict=False):
        pres.append(x.new_empty(rows.total, layer.out_features))
        keeping = follows._replace(pre=pres[-1])
        inputs.append(grouped.linear(inputs[-1], w, bias, rows, keeping, layer.transform))
    grad = grad.reshape(-1, net.sizes[-1])
    if len(pres) == len(then):
        grad = then[-1].backward(pres[-1]).by_torch(grad)
    of_x, of_weight = output_mask
    nothing = x.new_empty(0)
    grad_weight = weight.new_empty(weight.shape) if of_weight else nothing
    grads = list(_pieces(grad_weight, None, net)) if of_weight else []
    for n, (layer, w, _, _) in reversed(list(enumerate(pieces))):
        if of_weight:
            _, of_matrix, _, of_bias = grads[n]
            grouped.outer(grad, inputs[n], rows, of_matrix, w, layer.transform)
            if of_bias is not None:
                grouped.sums(grad, rows, of_bias)
        if n or of_x:
            before = then[n - 1].backward(pres[n - 1]) if n else NOTHING
            grad = grouped.linear(grad, w.mT, None, rows, before, layer.transform)
    return grad.view(x.shape) if of_x else nothing, grad_weight


def _pieces(
    weight: Tensor, scales_and_biases: Tensor | None, net: Network
) -> Iterator[tuple[Layer, Tensor, Tensor | None, Tensor | None]]:
    """Each layer with its matrix ``(B, O, I)``, scale and bias ``(B, O)``, views of its tasks'."""
    scaled = scales_and_biases is not None
    vectors = weight if scales_and_biases is None else scales_and_biases
    for layer, place in zip(net.layers, net.places(scaled), strict=True):
        out = layer.out_features
        w = weight[:, place.matrix :][:, : layer.weight_numel]
        scale = vectors[:, place.scale :][:, :out] if scaled else None
        bias = vectors[:, place.bias :][:, :out] if layer.bias else None
        yield layer, w.unflatten(1, (out, layer.in_features)), scale, bias


def _by_layers(
    x: Tensor, weight: Tensor, scales_and_biases: Tensor | None, rows: Rows, net: Network
) -> Tensor:
    pieces = _pieces(weight, scales_and_biases, net)
    for (layer, w, scale, bias), follows in zip(pieces, followed(net), strict=True):
        x = grouped.linear(x, w, bias, rows, follows, layer.transform, scale)
    return x


def _whole(
    x: Tensor, weight: Tensor, scales_and_biases: Tensor | None, rows: Rows, net: Network
) -> Tensor:
    kind = gpu.unit(x.dtype)
    transforms = tuple(layer.transform for layer in net.layers)
    most, warps = TOGETHER[kind]
    scaled = scales_and_biases is not None
    if scaled or any(transforms):
        most = min(most, FORMED)
    block = min(grouped.rows_together(rows, kind), most)
    tiles = tuple(map(power if block == 1 else tile, net.sizes))
    held = False
    if block == 1:
        # 32 weights of a layer a thread, whose loads are on their way together; fp64 that are
        # transformed would spill. Those of all layers stay if they take 72 registers a thread.
        weights = [i * o for i, o in pairwise(tiles)]
        share, warps = (512, 8) if kind == "fp64" and any(transforms) else (1024, 4)
        warps = min(max(max(weights) // share, 1), warps)
        held = sum(weights) * (1 + (kind == "fp64")) <= 72 * 32 * warps
    vectors = weight if scales_and_biases is None else scales_and_biases
    places, then = net.places(scaled), followed(net)
    task_bytes = weight.shape[1] * weight.element_size()
    work = grouped.stretches(rows, block, task_bytes)
    y = x.new_empty(len(x), net.sizes[-1])
    launch.start(
        _task_mlp, work.programs,
        x, weight, vectors, work.keys, work.order, y, rows.total, rows.per_task,
        *x.stride(), *weight.stride(), *vectors.stride(),
        SIZES=net.sizes, TILES=tiles, WEIGHTS=tuple(p.matrix for p in places),
        SCALES=tuple(p.scale for p in places),
        BIASES=tuple(p.bias if v.bias else None for p, v in zip(places, net.layers, strict=True)),
        ACTIVATIONS=tuple(f.name for f in then), PARAMETERS=tuple(f.parameter for f in then),
        TRANSFORMS=transforms, SCALED=scaled, RAGGED=rows.ragged,
        **launch.arithmetic(x.dtype), ALIGNED=math.gcd(weight.stride(0), 16), ROWS=work.rows,
        # No stages: they would fetch a task's weights again for each of its rows.
        HELD=held, BM=block, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return y
