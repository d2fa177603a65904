"""Given networks on the rows of their tasks: in one kernel where the widths fit, else by layers.

The rows are put in the order of their tasks once; every touched weight is read from memory once.
Steps of int8 are widened in registers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from hyperfast.kernels.triton import grouped, launch
from hyperfast.kernels.triton.activation import Finish, activate, decoded
from hyperfast.kernels.triton.grouped import NONE, owners
from hyperfast.kernels.triton.launch import Rows, agree, expect, power, rows_of, tile, up
from hyperfast.ops.network import layers_of
from hyperfast.plans import choose as plans


@triton.jit(do_not_specialize=["rows", "per_task"])
def _task_mlp(
    x, weight, affine, keys, order, y, rows, per_task, x_r, x_i, w_t, w_p, a_t, a_p,
    SIZES: tl.constexpr, TILES: tl.constexpr, WEIGHTS: tl.constexpr, SCALES: tl.constexpr,
    BIASES: tl.constexpr, ACTIVATIONS: tl.constexpr, PARAMETERS: tl.constexpr,
    TARGET_BIAS: tl.constexpr, HAS_AFFINE: tl.constexpr, RAGGED: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """``BM`` rows, in the order of their tasks, through the networks of these, which take turns.

    A row keeps what its own network makes of it, so that a NaN in one does not reach another. Of a
    task's row of ``weight`` the matrix of layer ``n`` begins at ``WEIGHTS[n]``.
    """
    p = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = p < rows
    r, task = owners(p, live, keys, order, per_task, RAGGED)
    LAST: tl.constexpr = len(ACTIVATIONS)
    WIDTH: tl.constexpr = TILES[LAST]
    result = tl.zeros((BM, WIDTH), y.dtype.element_ty)
    first = tl.arange(0, TILES[0])
    inside = (first < SIZES[0])[None, :]
    turn = tl.min(task)
    while turn < NONE:
        mine = (task == turn)[:, None]
        v = tl.load(x + r[:, None] * x_r + first[None, :].to(tl.int64) * x_i, mine & inside, 0.0)
        matrices = weight + tl.multiple_of(turn * w_t, ALIGNED)
        vectors = affine + turn * a_t
        for n in tl.static_range(LAST):
            i, o = tl.arange(0, TILES[n]), tl.arange(0, TILES[n + 1])
            at = matrices + (WEIGHTS[n] + o[:, None] * SIZES[n] + i[None, :]).to(tl.int64) * w_p
            w = tl.load(at, (o < SIZES[n + 1])[:, None] & (i < SIZES[n])[None, :], 0.0)
            if BM == 1:  # memory-bound: no matrix unit, the widest loads
                total = tl.sum(w.to(SUM) * v.to(SUM), 1)[None, :]
            else:
                w = tl.trans(w.to(v.dtype))
                total = tl.dot(v, w, input_precision=PRECISION, out_dtype=SUM)
            if HAS_AFFINE:
                scale = tl.load(vectors + (SCALES[n] + o).to(tl.int64) * a_p, o < SIZES[n + 1], 0.0)
                total *= scale.to(SUM)[None, :]
            if TARGET_BIAS:
                bias = tl.load(vectors + (BIASES[n] + o).to(tl.int64) * a_p, o < SIZES[n + 1], 0.0)
                total += bias.to(SUM)[None, :]
            v = activate(total, ACTIVATIONS[n], PARAMETERS[n]).to(y.dtype.element_ty)
        result = tl.where(mine, v, result)
        turn = tl.min(tl.where(task > turn, task, NONE))
    o = tl.arange(0, WIDTH)
    mask = live[:, None] & (o < SIZES[LAST])[None, :]
    tl.store(y + r[:, None] * SIZES[LAST] + o[None, :], result, mask)


# Most rows of a program and its warps, where rows share tasks: none spills, as 16 rows of fp64 do.
TOGETHER = {"half": (64, 4), "tf32": (64, 8), "fp32": (16, 8), "fp64": (1, 4)}


class Place(NamedTuple):
    """Where a layer's numbers begin in a task's row: its matrix in ``weight``, its scales in
    ``affine``, its bias in ``affine`` where there is one, else in ``weight``."""

    ins: int
    out: int
    weight: int
    scale: int
    bias: int


def task_mlp(
    x: Tensor,
    weight: Tensor,
    affine: Tensor | None,
    task_ids: Tensor | None,
    sizes: Sequence[int],
    target_bias: bool,
    activations: str,
) -> Tensor:
    layers = layers_of(sizes, target_bias, activations)
    places, at, first = [], 0, 0
    for layer in layers:
        m, o = layer.ins * layer.out, layer.out
        if affine is None:
            places.append(Place(layer.ins, o, at, 0, at + m))
            at += m + o * target_bias
        else:
            places.append(Place(layer.ins, o, at, first, first + o))
            at, first = at + m, first + o * (1 + target_bias)
    tasks = len(weight)
    agree(x=x, **({"weight": weight} if affine is None else {"affine": affine}))
    if weight.device != x.device:
        raise TypeError(f"weight must be on the device of x, {x.device}, got {weight.device}")
    expect(x, "x", (*x.shape[:-1], sizes[0]))
    expect(weight, "weight", (tasks, at))
    expect(affine, "affine", (tasks, first))
    rows = rows_of([x], [weight], task_ids, tasks)
    flat, then = x.reshape(-1, sizes[0]), decoded(activations)
    if plans.fits_one_kernel(sizes) and (affine is not None or not grouped.by_library(rows)):
        y = _whole(flat, weight, affine, rows, places, target_bias, then)
    else:
        y = _by_layers(flat, weight, affine, rows, places, target_bias, then)
    return y.view(*x.shape[:-1], sizes[-1])


def _by_layers(
    x: Tensor,
    weight: Tensor,
    affine: Tensor | None,
    rows: Rows,
    places: list[Place],
    target_bias: bool,
    then: list[Finish],
) -> Tensor:
    vectors = weight if affine is None else affine
    for place, follows in zip(places, then, strict=True):
        o = place.out
        w = weight[:, place.weight :][:, : o * place.ins].unflatten(1, (o, place.ins))
        scale = None if affine is None else affine[:, place.scale :][:, :o]
        bias = vectors[:, place.bias :][:, :o] if target_bias else None
        x = grouped.linear(x, w, bias, rows, follows, scale)
    return x


def _whole(
    x: Tensor,
    weight: Tensor,
    affine: Tensor | None,
    rows: Rows,
    places: list[Place],
    target_bias: bool,
    then: list[Finish],
) -> Tensor:
    kind = plans.arithmetic(x.dtype)
    most, warps = TOGETHER[kind]
    block = min(grouped.rows_together(rows, kind), most)
    sizes = (places[0].ins, *(place.out for place in places))
    tiles = tuple(map(power if block == 1 else tile, sizes))
    if block == 1:  # 32 weights a thread, whose loads are on their way together
        warps = min(max(max(i * o for i, o in pairwise(tiles)) // 1024, 1), 4)
    keys, order = rows.sorted
    vectors = weight if affine is None else affine
    y = x.new_empty(len(x), sizes[-1])
    launch.start(
        _task_mlp, up(rows.total, block),
        x, weight, vectors, keys, order, y, rows.total, rows.per_task,
        *x.stride(), *weight.stride(), *vectors.stride(),
        SIZES=sizes, TILES=tiles, WEIGHTS=tuple(place.weight for place in places),
        SCALES=tuple(place.scale for place in places), BIASES=tuple(place.bias for place in places),
        ACTIVATIONS=tuple(f.name for f in then), PARAMETERS=tuple(f.parameter for f in then),
        TARGET_BIAS=target_bias, HAS_AFFINE=affine is not None, RAGGED=rows.ragged,
        **launch.arithmetic(x.dtype), ALIGNED=math.gcd(weight.stride(0), 16), BM=block,
        num_warps=warps,
    )  # fmt: skip
    return y
