"""Rows times the given weights of their tasks, and the gradient of those weights.

``_task_linear``  one layer; every touched weight is read from memory once
``_task_outer``   the gradient of its weights

Weights may be given before their transform: a kernel applies it to what it has loaded, and
multiplies a gradient by its slope before it is stored.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperfast.kernels import reference
from hyperfast.kernels.triton import launch
from hyperfast.kernels.triton.activation import NOTHING, Finish, activate, finish, slope
from hyperfast.kernels.triton.launch import Config, Rows, deep, power, up
from hyperfast.layout import TRANSFORMS
from hyperfast.plans import gpu

NONE = tl.constexpr(2147483647)  # the task of no row: behind all others


@triton.jit
def owners(p, live, keys, order, per_task, RAGGED: tl.constexpr):
    """The rows at positions ``p`` of the order of their tasks, and these tasks."""
    if RAGGED:
        r = tl.load(order + p, live, 0)
        task = tl.load(keys + p, live, NONE).to(tl.int64)
    else:
        r = p
        task = tl.where(live, p // per_task, NONE)
    return r, task


@triton.jit
def transformed(w, scales, HAS_SCALE: tl.constexpr, TRANSFORM: tl.constexpr, SUM: tl.constexpr):
    """A tile of weights, a row an output, as its task uses it; steps of int8 are widened by their
    ``scales (O,)`` before."""
    w = w.to(SUM)
    if HAS_SCALE:
        w *= scales.to(SUM)[:, None]
    return activate(w, TRANSFORM, 1.0)


@triton.jit(do_not_specialize=["rows", "per_task"])
def _task_linear(
    x, w, scale, bias, keys, order, pre, y, rows, per_task, I, O,
    x_r, x_i, w_t, w_o, w_i, scale_t, scale_o, bias_t, bias_o,
    RAGGED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    TRANSFORM: tl.constexpr,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, KEEP: tl.constexpr, SLOPE: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y[r] = f(scale[t] * w[t]) x[r] + bias[t]`` for ``BM`` rows in the order of their tasks
    ``t``, and what follows; ``f`` is the transform.

    The tasks of a block take turns; a row keeps the product with its own weights only, so that
    a NaN in the weights of one task does not reach another.
    """
    blocks = tl.cdiv(O, BN)
    pid = tl.program_id(0)
    p = (pid // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    o = (pid % blocks) * BN + tl.arange(0, BN)
    live, inside = p < rows, o < O
    r, task = owners(p, live, keys, order, per_task, RAGGED)
    total = tl.zeros((BM, BN), SUM)
    turn = tl.min(task)
    while turn < NONE:
        mine = task == turn
        product = tl.zeros((BM, BN), SUM)
        # The weights of all layers of a task lie in one piece, whose length is seldom a multiple of
        # 16; what it is a multiple of decides how wide the loads can be.
        w_row = w + tl.multiple_of(turn * w_t, ALIGNED) + o.to(tl.int64) * w_o
        scales = o
        if HAS_SCALE:
            scales = tl.load(scale + turn * scale_t + o * scale_o, inside, 0.0)
        for i0 in range(0, I, BK):
            i = i0 + tl.arange(0, BK)
            x_tile = tl.load(
                x + r[:, None] * x_r + i[None, :].to(tl.int64) * x_i,
                mine[:, None] & (i < I)[None, :],
                0.0,
            )
            w_tile = tl.load(
                w_row[:, None] + i[None, :] * w_i, inside[:, None] & (i < I)[None, :], 0.0
            )
            if TRANSFORM != "":
                w_tile = transformed(w_tile, scales, HAS_SCALE, TRANSFORM, SUM)
            if BM == 1:  # memory-bound: no matrix unit, the widest loads
                product += tl.sum(w_tile.to(SUM) * x_tile.to(SUM), 1)[None, :]
            else:
                w_tile = tl.trans(w_tile.to(x_tile.dtype))
                product = tl.dot(x_tile, w_tile, product, input_precision=PRECISION, out_dtype=SUM)
        if HAS_SCALE and TRANSFORM == "":
            product *= scales.to(SUM)[None, :]
        if HAS_BIAS:
            product += tl.load(bias + turn * bias_t + o * bias_o, inside, 0.0).to(SUM)[None, :]
        total = tl.where(mine[:, None], product, total)
        turn = tl.min(tl.where(task > turn, task, NONE))
    at, mask = r[:, None] * O + o[None, :], live[:, None] & inside[None, :]
    total = finish(total, pre, at, mask, ACTIVATION, PARAMETER, KEEP, SLOPE)
    tl.store(y + at, total.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["per_task"])
def _task_outer(
    g, x, w, order, starts, y, per_task, O, I,
    g_r, g_o, x_r, x_i, w_t, w_o, w_i, y_t, y_o, y_i,
    RAGGED: tl.constexpr, TRANSFORM: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y[t,o,i] = f'(w[t,o,i]) sum g[r,o] x[r,i]`` over the rows ``r`` of task ``t``, in their
    order; ``f'`` is the slope of the transform."""
    blocks_i = tl.cdiv(I, BN)
    blocks = tl.cdiv(O, BM) * blocks_i
    pid = tl.program_id(0)
    task = (pid // blocks).to(tl.int64)
    o = pid % blocks // blocks_i * BM + tl.arange(0, BM)
    i = pid % blocks_i * BN + tl.arange(0, BN)
    if RAGGED:
        first = tl.load(starts + task)
        last = tl.load(starts + task + 1)
    else:
        first = task * per_task
        last = first + per_task
    total = tl.zeros((BM, BN), SUM)
    for p0 in range(first, last, BK):
        p = p0 + tl.arange(0, BK)
        live = p < last
        r = tl.load(order + p, live, 0) if RAGGED else p.to(tl.int64)
        g_tile = tl.load(
            g + r[None, :] * g_r + o[:, None].to(tl.int64) * g_o,
            (o < O)[:, None] & live[None, :],
            0.0,
        )
        x_tile = tl.load(
            x + r[:, None] * x_r + i[None, :].to(tl.int64) * x_i,
            live[:, None] & (i < I)[None, :],
            0.0,
        )
        if BK == 1:  # few rows a task: no padding to the matrix unit's depth
            total += g_tile.to(SUM) * x_tile.to(SUM)
        else:
            total = tl.dot(g_tile, x_tile, total, input_precision=PRECISION, out_dtype=SUM)
    o_offset, i_offset = o.to(tl.int64)[:, None], i.to(tl.int64)[None, :]
    mask = (o < O)[:, None] & (i < I)[None, :]
    if TRANSFORM != "":
        w_tile = tl.load(w + task * w_t + o_offset * w_o + i_offset * w_i, mask, 0.0)
        total *= slope(w_tile.to(SUM), TRANSFORM, 1.0)
    y_tile = y + task * y_t + o_offset * y_o + i_offset * y_i
    tl.store(y_tile, total.to(y.dtype.element_ty), mask)


TASK = {
    "half": Config(64, 64, 64),
    "tf32": Config(64, 64, 32),
    "fp32": Config(32, 64, 16, 8, 2),
    "fp64": Config(32, 32, 16, 4, 2),
}
# Rows a task from which padding a block of one task's rows to a matrix unit's 16 pays.
MANY = 16
# Rows a task from which a kernel would transform a weight again for every block of them, where
# a pass over the weights before a library's product does so once.
AGAIN = 64


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    then: Finish = NOTHING,
    transform: str = "",
    scale: Tensor | None = None,
) -> Tensor:
    """``(R, O)`` from ``x (R, I)``, ``weight (B, O, I)`` before its transform and ``bias (B, O)``,
    and what follows.

    With ``scale (B, O)`` the weight is int8: steps of so much.
    """
    _, out, ins = weight.shape
    if scale is None and by_library(rows, transform):
        shape = rows.tasks, rows.per_task
        weight = TRANSFORMS[transform].value(weight) if transform else weight
        return then.by_torch(
            reference.task_linear(x.unflatten(0, shape), weight, bias).flatten(0, 1)
        )
    keys, order = rows.sorted
    y = x.new_empty(len(x), out)
    kind = gpu.arithmetic(x.dtype)
    c = TASK[kind]
    block = rows_together(rows, kind)
    # A tile is in registers while it is transformed: one of 64 by 64 spills on sm_80.
    most = max(c.depth // 2, 16) if transform else c.depth
    columns, depth = min(power(out), c.columns), deep(ins, most)
    if block > 1:
        columns = max(columns, 16)
    else:
        depth = min(power(ins), 64)
    s, b = (weight if t is None else t for t in (scale, bias))
    launch.start(
        _task_linear,
        up(rows.total, block) * up(out, columns),
        x, weight, s, b, keys, order, then.pre, y, rows.total, rows.per_task, ins, out,
        *x.stride(), *weight.stride(), *s.stride()[:2], *b.stride()[:2],
        RAGGED=rows.ragged, HAS_SCALE=scale is not None, HAS_BIAS=bias is not None,
        TRANSFORM=transform, **then.options(), **launch.arithmetic(x.dtype),
        ALIGNED=math.gcd(weight.stride(0), 16), BM=block, BN=columns, BK=depth,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return y


def by_library(rows: Rows, transform: str = "") -> bool:
    """Whether a batched product of a library is as good as it gets."""
    return not rows.ragged and rows.per_task >= (AGAIN if transform else MANY)


def rows_together(rows: Rows, kind: str) -> int:
    """The rows of one program: 1 where few share a task, or enough to feed a matrix unit."""
    share = rows.total / max(rows.tasks, 1)
    few = 1 if share < 2 else min(power(int(share)), TASK[kind].rows)
    return few if kind == "fp32" or few == 1 else max(few, 16)


def outer(
    grad: Tensor,
    x: Tensor,
    rows: Rows,
    y: Tensor | None = None,
    weight: Tensor | None = None,
    transform: str = "",
) -> Tensor:
    """``(B, O, I)``: the sum over the rows of each task of ``grad (R, O)`` times ``x (R, I)``;
    times the slope of the transform at ``weight (B, O, I)``. ``y`` is where to write it."""
    out, ins, tasks = grad.shape[-1], x.shape[-1], rows.tasks
    y = grad.new_empty(tasks, out, ins) if y is None else y
    if by_library(rows, transform):
        shape = tasks, rows.per_task
        torch.bmm(grad.unflatten(0, shape).mT, x.unflatten(0, shape), out=y)
        if transform:
            assert weight is not None
            y *= TRANSFORMS[transform].slope(weight)
        return y
    _, order = rows.sorted
    kind = gpu.arithmetic(x.dtype)
    c = TASK[kind]
    depth = c.depth if rows.total >= MANY * tasks and min(out, ins) >= MANY else 1
    smallest = 1 if depth == 1 else 16
    block = max(min(power(out), c.rows), smallest)
    columns = max(min(power(ins), c.columns), smallest)
    w = y if weight is None else weight
    launch.start(
        _task_outer,
        tasks * up(out, block) * up(ins, columns),
        grad, x, w, order, rows.starts, y, rows.per_task, out, ins,
        *grad.stride(), *x.stride(), *w.stride(), *y.stride(),
        RAGGED=rows.ragged, TRANSFORM=transform, **launch.arithmetic(x.dtype),
        BM=block, BN=columns, BK=depth, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return y


def sums(each: Tensor, rows: Rows, y: Tensor | None = None) -> Tensor:
    """``(B, C)``: the sum of the rows of each task; ``y`` is where to write it."""
    total = outer(each, ones(each), rows, None if y is None else y.unsqueeze(2))
    return total.squeeze(2)


def ones(rows: Tensor) -> Tensor:
    """A constant input feature: the gradient of a bias is that of its weight."""
    return rows.new_ones(()).expand(len(rows), 1)
