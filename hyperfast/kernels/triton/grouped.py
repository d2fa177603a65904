"""Rows times the given weights of their tasks, and the gradient of those weights.

``_task_linear``  one layer; every touched weight is read from memory once
``_task_outer``   the gradient of its weights; with one input, the sum of each task's rows

Weights may be given before their transform: a kernel applies it to what it has loaded, and
multiplies a gradient by its slope before it is stored.

Mixed rows are sorted by their task, unless they run one by one and reading a task's weights again
takes less time; a program takes a stretch of one task's rows. Which rows begin one the programs see
for themselves, so that the host need not know how many a task has: there is a program for every
row, and all but the first of a stretch return at once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

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


@triton.jit
def stretch(p, keys, rows, per_task, RAGGED: tl.constexpr, ROWS: tl.constexpr):
    """What program ``p`` does: the task, and from where up to where in the order of tasks its rows
    lie, ``ROWS`` at most; none where they are another program's. With ``ROWS == 1`` mixed rows are
    in no order."""
    if not RAGGED:
        blocks = tl.cdiv(per_task, ROWS)
        task = p // blocks
        first = task * per_task + p % blocks * ROWS
        last = tl.minimum(first + ROWS, (task + 1) * per_task)
    elif ROWS == 1:
        task = tl.load(keys + p).to(tl.int64)
        first = p
        last = p + 1
    else:
        task = tl.load(keys + p).to(tl.int64)
        before = tl.load(keys + p - 1, p % ROWS != 0, -1)
        q = p + tl.arange(0, ROWS)
        near = (q < rows) & (q // ROWS == p // ROWS)
        same = near & (tl.load(keys + q, near, -1) == task)
        first = p
        last = p + tl.where(before == task, 0, tl.sum(same.to(tl.int64)))
    return task, first, last


@triton.jit
def row(p, live, order, RAGGED: tl.constexpr, ROWS: tl.constexpr):
    """The rows at positions ``p`` of that order."""
    if RAGGED and ROWS > 1:
        return tl.load(order + p, live, 0)
    return p


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
    SUM: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y[r] = f(scale[t] * w[t]) x[r] + bias[t]`` for a stretch of the rows of a task ``t``,
    ``BM`` at a time, and what follows; ``f`` is the transform."""
    blocks = tl.cdiv(O, BN)
    pid = tl.program_id(0)
    task, first, last = stretch((pid // blocks).to(tl.int64), keys, rows, per_task, RAGGED, ROWS)
    if first == last:
        return
    o = (pid % blocks) * BN + tl.arange(0, BN)
    inside = o < O
    # The weights of all layers of a task lie in one piece, whose length is seldom a multiple of
    # 16; what it is a multiple of decides how wide the loads can be.
    w_row = w + tl.multiple_of(task * w_t, ALIGNED) + o.to(tl.int64) * w_o
    scales = o
    if HAS_SCALE:
        scales = tl.load(scale + task * scale_t + o.to(tl.int64) * scale_o, inside, 0.0)
    for p0 in range(first, last, BM):
        p = p0 + tl.arange(0, BM)
        live = p < last
        r = row(p, live, order, RAGGED, ROWS)
        total = tl.zeros((BM, BN), SUM)
        for i0 in range(0, I, BK):
            i = i0 + tl.arange(0, BK)
            x_tile = tl.load(
                x + r[:, None] * x_r + i[None, :].to(tl.int64) * x_i,
                live[:, None] & (i < I)[None, :],
                0.0,
            )
            w_tile = tl.load(
                w_row[:, None] + i[None, :].to(tl.int64) * w_i,
                inside[:, None] & (i < I)[None, :],
                0.0,
            )
            if TRANSFORM != "":
                w_tile = transformed(w_tile, scales, HAS_SCALE, TRANSFORM, SUM)
            if BM == 1:  # memory-bound: no matrix unit, the widest loads
                total += tl.sum(w_tile.to(SUM) * x_tile.to(SUM), 1)[None, :]
            else:
                w_tile = tl.trans(w_tile.to(x_tile.dtype))
                total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION, out_dtype=SUM)
        if HAS_SCALE and TRANSFORM == "":
            total *= scales.to(SUM)[None, :]
        if HAS_BIAS:
            added = tl.load(bias + task * bias_t + o.to(tl.int64) * bias_o, inside, 0.0)
            total += added.to(SUM)[None, :]
        at, mask = r[:, None] * O + o[None, :], live[:, None] & inside[None, :]
        total = finish(total, pre, at, mask, ACTIVATION, PARAMETER, KEEP, SLOPE)
        tl.store(y + at, total.to(y.dtype.element_ty), mask)


@triton.jit
def _products(
    total, g, x, order, first, last, o, i, O, I, g_r, g_o, x_r, x_i,
    RAGGED: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``total``, and of the rows at positions ``first`` up to ``last`` the sum of
    ``g[r,o] x[r,i]``."""
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
        elif BN == 1:
            total += tl.sum(g_tile.to(SUM) * tl.trans(x_tile).to(SUM), 1)[:, None]
        else:
            total = tl.dot(g_tile, x_tile, total, input_precision=PRECISION, out_dtype=SUM)
    return total


@triton.jit
def _task_parts(
    g, x, keys, order, sums, O, I, g_r, g_o, x_r, x_i,
    PART: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``sums[n,o,i]``: of the ``n``-th ``PART`` rows in the order of tasks, if one task has them
    all, the sum of ``g[r,o] x[r,i]``."""
    blocks_i = tl.cdiv(I, BN)
    blocks = tl.cdiv(O, BM) * blocks_i
    pid = tl.program_id(0)
    part = (pid // blocks).to(tl.int64)
    first = part * PART
    last = first + PART
    if tl.load(keys + first) != tl.load(keys + last - 1):
        return
    o = pid % blocks // blocks_i * BM + tl.arange(0, BM)
    i = pid % blocks_i * BN + tl.arange(0, BN)
    total = _products(
        tl.zeros((BM, BN), SUM), g, x, order, first, last, o, i, O, I, g_r, g_o, x_r, x_i,
        True, SUM, PRECISION, BN, BK,
    )  # fmt: skip
    at = (part * O + o[:, None]) * I + i[None, :]
    tl.store(sums + at, total, (o < O)[:, None] & (i < I)[None, :])


@triton.jit(do_not_specialize=["per_task"])
def _task_outer(
    g, x, w, order, starts, sums, y, per_task, O, I,
    g_r, g_o, x_r, x_i, w_t, w_o, w_i, y_t, y_o, y_i,
    RAGGED: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, TRANSFORM: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y[t,o,i] = f'(w[t,o,i]) sum g[r,o] x[r,i]`` over the rows ``r`` of task ``t``, in their
    order; ``f'`` is the slope of the transform. With ``PARTS`` those that fill a part of ``PART``
    rows are summed already."""
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
    o_offset, i_offset = o.to(tl.int64)[:, None], i.to(tl.int64)[None, :]
    mask = (o < O)[:, None] & (i < I)[None, :]
    total = tl.zeros((BM, BN), SUM)
    if PARTS:
        begin = tl.cdiv(first, PART)
        end = tl.maximum(last // PART, begin)
        total = _products(
            total, g, x, order, first, tl.minimum(begin * PART, last), o, i, O, I,
            g_r, g_o, x_r, x_i, RAGGED, SUM, PRECISION, BN, BK,
        )  # fmt: skip
        if BN == 1:
            for n0 in range(begin, end, BK):
                n = n0 + tl.arange(0, BK)
                some = tl.load(sums + n[None, :] * O + o_offset, mask & (n < end)[None, :], 0.0)
                total += tl.sum(some, 1)[:, None]
        else:
            for part in range(begin, end):
                total += tl.load(sums + (part * O + o_offset) * I + i_offset, mask, 0.0)
        first = tl.minimum(end * PART, last)
    total = _products(
        total, g, x, order, first, last, o, i, O, I, g_r, g_o, x_r, x_i,
        RAGGED, SUM, PRECISION, BN, BK,
    )  # fmt: skip
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
# Rows of a task in one program: a hot task's rows are cut, and cost each program one more read of
# its weights, 1/32 of what they would cost one by one.
STRETCH = 32
# Rows of which a task's sum is cut into parts: of 65,536 rows, all of one task, 64 parts are summed
# at once, and then their 64 sums.
PART = 1024
COLUMN = 32  # rows that are added at a time where the sum has one column
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
    y = x.new_empty(len(x), out)
    kind = gpu.unit(x.dtype)
    block = rows_together(rows, kind)
    c = TASK["fp32" if block == 1 and kind == "tf32" else kind]  # one by one, both are the same
    work = stretches(rows, block, out * ins * weight.element_size())
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
        work.programs * up(out, columns),
        x, weight, s, b, work.keys, work.order, then.pre, y, rows.total, rows.per_task, ins, out,
        *x.stride(), *weight.stride(), *s.stride()[:2], *b.stride()[:2],
        RAGGED=rows.ragged, HAS_SCALE=scale is not None, HAS_BIAS=bias is not None,
        TRANSFORM=transform, **then.options(), **launch.arithmetic(x.dtype),
        ALIGNED=math.gcd(weight.stride(0), 16), ROWS=work.rows,
        BM=block, BN=columns, BK=depth,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return y


def by_library(rows: Rows, transform: str = "") -> bool:
    """Whether a batched product of a library is as good as it gets."""
    return not rows.ragged and rows.per_task >= (AGAIN if transform else MANY)


class Stretches(NamedTuple):
    """Programs, each for ``rows`` rows of one task at most; mixed rows by their keys, in the order
    of these unless ``rows`` is 1."""

    programs: int
    rows: int
    keys: Tensor | None
    order: Tensor | None


def stretches(rows: Rows, block: int, task_bytes: int) -> Stretches:
    """How rows are cut, of which a program takes ``block`` at a time, and of whose tasks it reads
    ``task_bytes``. Mixed rows that run one by one stay as they are where to sort them would take
    longer than to read a task's weights again for each of its rows."""
    if rows.ragged and block == 1 and not gpu.sorting_pays(rows.total * task_bytes):
        return Stretches(rows.total, 1, rows.keys, rows.keys)
    length = max(block, STRETCH)
    programs = rows.total if rows.ragged else rows.tasks * up(rows.per_task, length)
    return Stretches(programs, length, *rows.sorted)


def rows_together(rows: Rows, kind: str) -> int:
    """The rows that a program runs at once: 1 where few share a task, or enough to feed a matrix
    unit."""
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
    keys, order = rows.sorted
    kind = gpu.unit(x.dtype)
    c = TASK[kind]
    depth = c.depth if rows.total >= MANY * tasks and min(out, ins) >= MANY else 1
    depth = COLUMN if ins == 1 else depth
    smallest = 16 if depth > 1 and ins > 1 else 1
    block = max(min(power(out), c.rows), smallest)
    columns = max(min(power(ins), c.columns), smallest)
    tiles = up(out, block) * up(ins, columns)
    options = launch.arithmetic(x.dtype) | {
        "PART": PART, "BM": block, "BN": columns, "BK": depth,
        "num_warps": c.warps, "num_stages": c.stages,
    }  # fmt: skip
    parts = rows.total // PART if rows.ragged else 0
    sums = y
    if parts:
        wide = torch.promote_types(x.dtype, torch.float32)
        sums = x.new_empty(parts, out, ins, dtype=wide)
        launch.start(
            _task_parts, parts * tiles, grad, x, keys, order, sums, out, ins,
            *grad.stride(), *x.stride(), **options,
        )  # fmt: skip
    w = y if weight is None else weight
    launch.start(
        _task_outer, tasks * tiles,
        grad, x, w, order, rows.starts, sums, y, rows.per_task, out, ins,
        *grad.stride(), *x.stride(), *w.stride(), *y.stride(),
        RAGGED=rows.ragged, PARTS=parts > 0, TRANSFORM=transform, **options,
    )  # fmt: skip
    return y


def sums(each: Tensor, rows: Rows, y: Tensor | None = None) -> Tensor:
    """``(B, C)``: the sum of the rows of each task; ``y`` is where to write it."""
    y = each.new_empty(rows.tasks, each.shape[1]) if y is None else y
    if not rows.ragged:
        return torch.sum(each.unflatten(0, (rows.tasks, rows.per_task)), 1, out=y)
    outer(each, ones(each), rows, y.unsqueeze(2))
    return y


def ones(rows: Tensor) -> Tensor:
    """A constant input feature: the gradient of a bias is that of its weight."""
    return rows.new_ones(()).expand(len(rows), 1)
