"""The registered ops as Triton kernels, for CUDA and ROCm devices; signatures are those of the ops.

A generated layer is the trilinear form ``y[r,n] = sum_jk v[n,j,k] c[r,j] a[r,k]``, and so is each
of its derivatives. Four kernels cover the family:

``_contract``     y from v, a, c: a matrix product whose left operand is formed in registers
``_outer``        the gradient of v, summed over rows by the program that owns the tile: no atomics
``_task_linear``  rows times the given weights of their tasks; every touched weight is read once
``_task_outer``   the gradient of those weights

Rows of mixed tasks are never moved: they are read, and written, through the order that a stable
sort of their task ids gives. Offsets that can pass 2^31 elements are 64-bit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hyperfast import checks, eager, reference
from hyperfast import plan as plans

INTERPRETED = triton.knobs.runtime.interpret


@triton.jit(debug=True)
def _keys(ids, keys, rows, tasks, BLOCK: tl.constexpr):
    """Task ids as int32 sort keys. An id out of range traps, as PyTorch's own indexing does."""
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    id = tl.load(ids + r, mask=r < rows, other=0)
    tl.device_assert((id >= 0) & (id < tasks), "task_ids out of range", mask=r < rows)
    tl.store(keys + r, tl.minimum(tl.maximum(id, 0), tasks - 1).to(tl.int32), mask=r < rows)


@triton.jit
def _entry(r, keys, per_task, live, TASK: tl.constexpr, RAGGED: tl.constexpr):
    """The entry of an operand that belongs to row ``r``: the row itself, or its task."""
    if TASK and RAGGED:
        r = tl.load(keys + r, mask=live, other=0).to(tl.int64)
    elif TASK:
        r = r // per_task
    return r


@triton.jit(do_not_specialize=["rows", "per_task"])
def _contract(
    a, c, v, u, s, bias, keys, y, rows, per_task, J, K, N,
    a_r, a_k, c_r, c_j, v_n, v_j, v_k, u_n, u_k, s_n, s_j, bias_n,
    A_TASK: tl.constexpr, C_TASK: tl.constexpr, RAGGED: tl.constexpr,
    HAS_U: tl.constexpr, HAS_S: tl.constexpr, HAS_BIAS: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y[r,n] = sum_jk v[n,j,k] c[r,j] a[r,k] + u[n,:] a[r,:] + s[n,:] c[r,:] + bias[n]``.

    A block of ``a`` stays in registers while ``j`` runs: each step scales its rows by one column of
    ``c`` and multiplies it by one slice of ``v``, so that the Khatri-Rao product is never stored.
    """
    blocks = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    r = (pid // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    n = (pid % blocks) * BN + tl.arange(0, BN)
    n_offset = n.to(tl.int64)[None, :]
    live, inside = r < rows, n < N
    a_row = a + _entry(r, keys, per_task, live, A_TASK, RAGGED) * a_r
    c_row = c + _entry(r, keys, per_task, live, C_TASK, RAGGED) * c_r
    total = tl.zeros((BM, BN), SUM)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        a_tile = tl.load(a_row[:, None] + k[None, :] * a_k, live[:, None] & (k < K)[None, :], 0.0)
        mask = (k < K)[:, None] & inside[None, :]
        if HAS_U:
            u_tile = tl.load(u + n_offset * u_n + k[:, None] * u_k, mask, 0.0)
            total = tl.dot(a_tile, u_tile, total, input_precision=PRECISION, out_dtype=SUM)
        c_column = c_row
        v_slice = v + n_offset * v_n + k[:, None] * v_k
        for _ in range(J):
            scale = tl.load(c_column, live, 0.0)
            v_tile = tl.load(v_slice, mask, 0.0)
            pairs = a_tile * scale[:, None]
            total = tl.dot(pairs, v_tile, total, input_precision=PRECISION, out_dtype=SUM)
            c_column += c_j
            v_slice += v_j
    if HAS_S:
        for j0 in range(0, J, BK):
            j = j0 + tl.arange(0, BK)
            c_tile = tl.load(
                c_row[:, None] + j[None, :] * c_j, live[:, None] & (j < J)[None, :], 0.0
            )
            s_tile = tl.load(
                s + n_offset * s_n + j[:, None] * s_j, (j < J)[:, None] & inside[None, :], 0.0
            )
            total = tl.dot(c_tile, s_tile, total, input_precision=PRECISION, out_dtype=SUM)
    if HAS_BIAS:
        total += tl.load(bias + n * bias_n, inside, 0.0).to(SUM)[None, :]
    tl.store(
        y + r[:, None] * N + n[None, :],
        total.to(y.dtype.element_ty),
        live[:, None] & inside[None, :],
    )


@triton.jit(do_not_specialize=["rows", "chunk"])
def _outer(
    a, b, c, keys, y, rows, per_task, chunk, A, B, C,
    a_r, a_n, b_r, b_n, c_r, c_n, y_s, y_a, y_b, y_c,
    A_TASK: tl.constexpr, B_TASK: tl.constexpr, C_TASK: tl.constexpr, RAGGED: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
    BA: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``y[s,i,j,k] = sum_r a[r,i] b[r,j] c[r,k]`` over the ``chunk`` rows of part ``s``.

    A program owns a tile of ``BA * BB`` by ``BC``; its left operand is formed in registers.
    """
    blocks_b, blocks_c = tl.cdiv(B, BB), tl.cdiv(C, BC)
    blocks = tl.cdiv(A, BA) * blocks_b * blocks_c
    pid = tl.program_id(0)
    part, pid = (pid // blocks).to(tl.int64), pid % blocks
    i = pid // (blocks_b * blocks_c) * BA + tl.arange(0, BA)
    j = pid // blocks_c % blocks_b * BB + tl.arange(0, BB)
    k = pid % blocks_c * BC + tl.arange(0, BC)
    last = tl.minimum((part + 1) * chunk, rows)
    total = tl.zeros((BA * BB, BC), SUM)
    for r0 in range(part * chunk, last, BR):
        r = r0 + tl.arange(0, BR)
        live = r < last
        a_row = a + _entry(r, keys, per_task, live, A_TASK, RAGGED) * a_r
        b_row = b + _entry(r, keys, per_task, live, B_TASK, RAGGED) * b_r
        c_row = c + _entry(r, keys, per_task, live, C_TASK, RAGGED) * c_r
        a_tile = tl.load(a_row[None, :] + i[:, None] * a_n, (i < A)[:, None] & live[None, :], 0.0)
        b_tile = tl.load(b_row[None, :] + j[:, None] * b_n, (j < B)[:, None] & live[None, :], 0.0)
        c_tile = tl.load(c_row[:, None] + k[None, :] * c_n, live[:, None] & (k < C)[None, :], 0.0)
        pairs = tl.reshape(a_tile[:, None, :] * b_tile[None, :, :], (BA * BB, BR))
        total = tl.dot(pairs, c_tile, total, input_precision=PRECISION, out_dtype=SUM)
    q = tl.arange(0, BA * BB)
    i = pid // (blocks_b * blocks_c) * BA + q // BB
    j = pid // blocks_c % blocks_b * BB + q % BB
    y_row = y + part * y_s + i.to(tl.int64) * y_a + j.to(tl.int64) * y_b
    tl.store(
        y_row[:, None] + k.to(tl.int64)[None, :] * y_c,
        total.to(y.dtype.element_ty),
        ((i < A) & (j < B))[:, None] & (k < C)[None, :],
    )


@triton.jit(do_not_specialize=["rows", "per_task"])
def _task_linear(
    x, w, bias, keys, order, y, rows, per_task, I, O,
    x_r, x_i, w_t, w_o, w_i, bias_t, bias_o,
    RAGGED: tl.constexpr, HAS_BIAS: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y[r] = w[t] x[r] + bias[t]`` for ``BM`` rows in the order of their tasks ``t``.

    The tasks of a block take turns; a row keeps the product with its own weights only, so that
    a NaN in the weights of one task does not reach another.
    """
    blocks = tl.cdiv(O, BN)
    pid = tl.program_id(0)
    p = (pid // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    o = (pid % blocks) * BN + tl.arange(0, BN)
    live, inside = p < rows, o < O
    NONE: tl.constexpr = 2147483647
    if RAGGED:
        r = tl.load(order + p, live, 0)
        task = tl.load(keys + p, live, NONE).to(tl.int64)
    else:
        r = p
        task = tl.where(live, p // per_task, NONE)
    total = tl.zeros((BM, BN), SUM)
    turn = tl.min(task)
    while turn < NONE:
        mine = task == turn
        product = tl.zeros((BM, BN), SUM)
        # The weights of all layers of a task lie in one piece, whose length is seldom a multiple of
        # 16; what it is a multiple of decides how wide the loads can be.
        w_row = w + tl.multiple_of(turn * w_t, ALIGNED) + o.to(tl.int64) * w_o
        for i0 in range(0, I, BK):
            i = i0 + tl.arange(0, BK)
            x_tile = tl.load(
                x + r[:, None] * x_r + i[None, :] * x_i, mine[:, None] & (i < I)[None, :], 0.0
            )
            w_tile = tl.load(
                w_row[:, None] + i[None, :] * w_i, inside[:, None] & (i < I)[None, :], 0.0
            )
            if BM == 1:  # memory-bound: no matrix unit, the widest loads
                product += tl.sum(w_tile.to(SUM) * x_tile.to(SUM), 1)[None, :]
            else:
                product = tl.dot(
                    x_tile, tl.trans(w_tile), product, input_precision=PRECISION, out_dtype=SUM
                )
        if HAS_BIAS:
            product += tl.load(bias + turn * bias_t + o * bias_o, inside, 0.0).to(SUM)[None, :]
        total = tl.where(mine[:, None], product, total)
        turn = tl.min(tl.where(task > turn, task, NONE))
    tl.store(
        y + r[:, None] * O + o[None, :],
        total.to(y.dtype.element_ty),
        live[:, None] & inside[None, :],
    )


@triton.jit(do_not_specialize=["per_task"])
def _task_outer(
    g, x, order, starts, y, per_task, O, I,
    g_r, g_o, x_r, x_i,
    RAGGED: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y[t,o,i] = sum g[r,o] x[r,i]`` over the rows ``r`` of task ``t``, in their order."""
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
            g + r[None, :] * g_r + o[:, None] * g_o, (o < O)[:, None] & live[None, :], 0.0
        )
        x_tile = tl.load(
            x + r[:, None] * x_r + i[None, :] * x_i, live[:, None] & (i < I)[None, :], 0.0
        )
        if BK == 1:  # few rows a task: no padding to the matrix unit's depth
            total += g_tile.to(SUM) * x_tile.to(SUM)
        else:
            total = tl.dot(g_tile, x_tile, total, input_precision=PRECISION, out_dtype=SUM)
    y_row = y + task * O * I + o.to(tl.int64) * I
    tl.store(
        y_row[:, None] + i[None, :],
        total.to(y.dtype.element_ty),
        (o < O)[:, None] & (i < I)[None, :],
    )


class Config(NamedTuple):
    """A tile of the output, the depth of one product, warps a program, stages of its pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3


# By kind of arithmetic, largest tile first: a large tile reads the shared operand less often and
# forms its left operand for more columns, a small one fills the device with few rows. On sm_90 a
# step of the 16-bit kernel is about 110 to 140 instructions a warp; the matrix units, at 2048
# multiply-adds a cycle, take 64 cycles for a tile of 64 by 32, 128 for 64 by 64, 256 for 128 by 64:
# from there on they, not the issue of instructions, are the bound. All fit the 64 KB of shared
# memory of an MI300. On sm_90 none spills but the largest of IEEE fp32; ptxas gives up 4 registers
# there, and of some on sm_80.
CONTRACT = {
    "half": (
        Config(128, 128, 64, 8),
        Config(128, 64, 64),
        Config(64, 64, 64),
        Config(64, 32, 64),
        Config(16, 32, 64),
    ),
    "tf32": (Config(128, 64, 32, 8), Config(64, 64, 32, 8), Config(64, 32, 32), Config(16, 32, 32)),
    "fp32": (
        Config(128, 64, 16, 8, 2),
        Config(64, 64, 16, 8, 2),
        Config(64, 32, 16, 4, 2),
        Config(16, 32, 16, 4, 2),
    ),
    "fp64": (Config(64, 64, 16, 8, 2), Config(64, 32, 16, 4, 2), Config(16, 32, 16, 4, 2)),
}
# One size each, for the rows are split to fill the device. 256 rows of the tile use what is loaded
# for twice as many products as 128, which halves the instructions a product on sm_90.
OUTER = {
    "half": (Config(256, 64, 32, 8, 2),),
    "tf32": (Config(256, 64, 32, 8, 2),),
    "fp32": (Config(128, 64, 16, 8, 2),),
    "fp64": (Config(32, 32, 16, 4, 2),),
}
TASK = {
    "half": Config(64, 64, 64),
    "tf32": Config(64, 64, 32),
    "fp32": Config(32, 64, 16, 8, 2),
    "fp64": Config(32, 32, 16, 4, 2),
}
# Rows a task from which padding a block of one task's rows to a matrix unit's 16 pays.
MANY = 16


class Rows(NamedTuple):
    """Which task every row belongs to: ``keys``, or ``per_task`` rows each when there are none."""

    total: int
    per_task: int
    keys: Tensor | None


def hyper_linear(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    task_ids: Tensor | None,
    target_bias: bool,
    plan: str,
) -> Tensor:
    ins = x.shape[-1]
    out = reference.out_features(weight, ins, target_bias)
    n = out * ins
    _agree(x=x, h=h, weight=weight, bias=bias)
    _expect(weight, "weight", (n + out * target_bias, h.shape[1]))
    _expect(bias, "bias", weight.shape[:1])
    rows = _rows([x], [h], task_ids, len(h))
    plan = plan or _choose(x, len(h), out, ins, h.shape[1], task_ids)
    if plan == "tile" and task_ids is not None:
        return eager.hyper_linear(x, h, weight, bias, task_ids, target_bias, plan)
    if plan == "tile":
        y = x.new_empty(*x.shape[:-1], out)
        for t in _blocks(h, len(weight)):
            y[t] = hyper_linear(x[t], h[t], weight, bias, None, target_bias, "materialize")
        return y
    if plan == "materialize":
        flat = F.linear(h, weight, bias)
        w, b = flat[:, :n].unflatten(1, (out, ins)), flat[:, n:] if target_bias else None
        return task_linear(x, w, b, task_ids)
    y = _trilinear(
        (x.reshape(-1, ins), False),
        (h, True),
        weight[:n].unflatten(0, (out, ins)),
        None if bias is None else bias[:n].view(out, ins),
        weight[n:] if target_bias else None,
        bias[n:] if target_bias and bias is not None else None,
        rows,
        x.dtype,
    )
    return y.view(*x.shape[:-1], out)


def hyper_linear_grad_x(
    grad: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    task_ids: Tensor | None,
    plan: str,
) -> Tensor:
    out = grad.shape[-1]
    ins = len(weight) // out
    _agree(grad=grad, h=h, weight=weight, bias=bias)
    _expect(weight, "weight", (out * ins, h.shape[1]))
    _expect(bias, "bias", weight.shape[:1])
    rows = _rows([grad], [h], task_ids, len(h))
    plan = plan or _choose(grad, len(h), out, ins, h.shape[1], task_ids)
    if plan == "tile" and task_ids is not None:
        return eager.hyper_linear_grad_x(grad, h, weight, bias, task_ids, plan)
    if plan == "tile":
        y = grad.new_empty(*grad.shape[:-1], ins)
        for t in _blocks(h, len(weight)):
            y[t] = hyper_linear_grad_x(grad[t], h[t], weight, bias, None, "materialize")
        return y
    if plan == "materialize":
        w = F.linear(h, weight, bias).unflatten(1, (out, ins))
        return task_linear(grad, w.mT, None, task_ids)
    y = _trilinear(
        (grad.reshape(-1, out), False),
        (h, True),
        weight.unflatten(0, (out, ins)).transpose(0, 1),
        None if bias is None else bias.view(out, ins).mT,
        None,
        None,
        rows,
        grad.dtype,
    )
    return y.view(*grad.shape[:-1], ins)


def hyper_linear_grad_h(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    task_ids: Tensor | None,
    tasks: int,
    target_bias: bool,
    plan: str,
) -> Tensor:
    out, ins, features = grad.shape[-1], x.shape[-1], weight.shape[1]
    n = out * ins
    _agree(grad=grad, x=x, weight=weight)
    _expect(weight, "weight", (n + out * target_bias, features))
    plan = plan or _choose(x, tasks, out, ins, features, task_ids)
    rows = _rows([grad, x], [], task_ids, tasks)
    if plan == "tile" and task_ids is not None:
        return eager.hyper_linear_grad_h(grad, x, weight, task_ids, tasks, target_bias, plan)
    if plan == "tile":
        y = grad.new_empty(tasks, features)
        for t in _blocks(y, len(weight)):
            y[t] = _grad_flat(grad[t], x[t], None, len(y[t]), target_bias) @ weight
        return y
    if plan == "materialize":
        return _grad_flat(grad, x, task_ids, tasks, target_bias) @ weight
    single = task_ids is None and rows.per_task == 1
    each = _trilinear(
        (grad.reshape(-1, out), False),
        (x.reshape(-1, ins), False),
        weight[:n].unflatten(0, (out, ins)).permute(2, 0, 1),
        weight[n:].mT if target_bias else None,
        None,
        None,
        rows,
        # What is summed again is not rounded to 16 bits in between.
        grad.dtype if single else torch.promote_types(grad.dtype, torch.float32),
    )
    if single:
        return each
    each = each.view(*grad.shape[:-1], features)
    if task_ids is None:
        return each.sum(1).to(grad.dtype)
    ones = each.new_ones(()).expand(len(each), 1)
    return task_linear_grad_weight(each, ones, task_ids, tasks).squeeze(2).to(grad.dtype)


def hyper_linear_grad_weight(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    task_ids: Tensor | None,
    target_bias: bool,
    plan: str,
) -> Tensor:
    out, ins, features = grad.shape[-1], x.shape[-1], h.shape[1]
    _agree(grad=grad, x=x, h=h)
    plan = plan or _choose(x, len(h), out, ins, features, task_ids)
    rows = _rows([grad, x], [h], task_ids, len(h))
    n = out * ins
    if plan == "tile" and task_ids is not None:
        return eager.hyper_linear_grad_weight(grad, x, h, task_ids, target_bias, plan)
    if plan == "tile":  # summed in fp32, or the rounding would grow with the number of blocks
        total = torch.promote_types(grad.dtype, torch.float32)
        y = grad.new_zeros(n + out * target_bias, features, dtype=total)
        for t in _blocks(h, len(y)):
            y += _grad_flat(grad[t], x[t], None, len(h[t]), target_bias).mT @ h[t]
        return y.to(grad.dtype)
    if plan == "materialize":
        return _grad_flat(grad, x, task_ids, len(h), target_bias).mT @ h
    grad, x = grad.reshape(-1, out), x.reshape(-1, ins)
    y = grad.new_empty(n + out * target_bias, features)
    _sum_outer((grad, False), (x, False), (h, True), y[:n].unflatten(0, (out, ins)), rows)
    if target_bias:
        ones = grad.new_ones(()).expand(len(grad), 1)
        _sum_outer((ones, False), (grad, False), (h, True), y[n:].unsqueeze(0), rows)
    return y


def task_linear(x: Tensor, weight: Tensor, bias: Tensor | None, task_ids: Tensor | None) -> Tensor:
    tasks, out, ins = weight.shape
    _agree(x=x, weight=weight, bias=bias)
    _expect(x, "x", (*x.shape[:-1], ins))
    _expect(bias, "bias", weight.shape[:2])
    rows = _rows([x], [weight], task_ids, tasks)
    if rows.keys is None and rows.per_task >= MANY:
        return reference.task_linear(x, weight, bias)
    order = None
    if rows.keys is not None:
        keys, order = rows.keys.sort(stable=True)
        rows = rows._replace(keys=keys)
    y = x.new_empty(*x.shape[:-1], out)
    x = x.reshape(-1, ins)
    kind = plans.arithmetic(x.dtype)
    c = TASK[kind]
    share = rows.total / max(tasks, 1)
    few = 1 if share < 2 else min(_power(int(share)), c.rows)
    block = few if kind == "fp32" or few == 1 else max(few, 16)
    columns, depth = min(_power(out), c.columns), _depth(ins, c.depth)
    if block > 1:
        columns = max(columns, 16)
    else:
        depth = min(_power(ins), 64)
    b = weight if bias is None else bias
    _launch(
        _task_linear,
        _up(rows.total, block) * _up(out, columns),
        x, weight, b, rows.keys, order, y, rows.total, rows.per_task, ins, out,
        *x.stride(), *weight.stride(), *b.stride()[:2],
        RAGGED=order is not None, HAS_BIAS=bias is not None, **_arithmetic(x.dtype),
        ALIGNED=math.gcd(weight.stride(0), 16), BM=block, BN=columns, BK=depth,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return y


def task_linear_grad_weight(grad: Tensor, x: Tensor, task_ids: Tensor | None, tasks: int) -> Tensor:
    out, ins = grad.shape[-1], x.shape[-1]
    _agree(grad=grad, x=x)
    rows = _rows([grad, x], [], task_ids, tasks)
    if rows.keys is None and rows.per_task >= MANY:
        return reference.task_linear_grad_weight(grad, x, None, tasks)
    order = starts = None
    if rows.keys is not None:
        keys, order = rows.keys.sort(stable=True)
        edges = torch.arange(tasks + 1, dtype=keys.dtype, device=keys.device)
        starts = torch.searchsorted(keys, edges)
    y = grad.new_empty(tasks, out, ins)
    grad, x = grad.reshape(-1, out), x.reshape(-1, ins)
    kind = plans.arithmetic(x.dtype)
    c = TASK[kind]
    depth = c.depth if rows.total >= MANY * tasks and min(out, ins) >= MANY else 1
    smallest = 1 if depth == 1 else 16
    block = max(min(_power(out), c.rows), smallest)
    columns = max(min(_power(ins), c.columns), smallest)
    _launch(
        _task_outer,
        tasks * _up(out, block) * _up(ins, columns),
        grad, x, order, starts, y, rows.per_task, out, ins, *grad.stride(), *x.stride(),
        RAGGED=order is not None, **_arithmetic(x.dtype),
        BM=block, BN=columns, BK=depth, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return y


def _grad_flat(
    grad: Tensor, x: Tensor, task_ids: Tensor | None, tasks: int, target_bias: bool
) -> Tensor:
    """``(B, P)``: the gradient with respect to the generated vector of every task."""
    w = task_linear_grad_weight(grad, x, task_ids, tasks).flatten(1)
    if not target_bias:
        return w
    ones = grad.new_ones(()).expand(*grad.shape[:-1], 1)
    return torch.cat([w, task_linear_grad_weight(grad, ones, task_ids, tasks).flatten(1)], 1)


# An operand: its rows, and whether they belong to tasks instead.
Operand = tuple[Tensor, bool]


def _trilinear(
    a: Operand,
    b: Operand,
    v: Tensor,
    a_weight: Tensor | None,
    b_weight: Tensor | None,
    bias: Tensor | None,
    rows: Rows,
    dtype: torch.dtype,
) -> Tensor:
    """``(R, N)``: ``y[r,n] = sum_ij v[n,i,j] a[r,i] b[r,j]`` and what is linear in ``a``, in ``b``,
    and constant: ``a_weight (N, I)``, ``b_weight (N, J)``, ``bias (N,)``.
    """
    n, i, j = v.shape
    table = CONTRACT[plans.arithmetic(v.dtype)]
    cap = table[0].depth

    def work(looped: int, dotted: int) -> int:
        depth = _depth(dotted, cap)
        return looped * _up(dotted, depth) * (depth + 16)

    # The kernel multiplies along one of the two and loops over the other. Where both cost the
    # same, it multiplies along the one that is contiguous.
    along_i, along_j = work(j, i), work(i, j)
    if along_j > along_i or (along_j == along_i and v.stride(1) == 1):
        a, b, v, a_weight, b_weight = b, a, v.mT, b_weight, a_weight
    (c, c_task), (a_, a_task) = a, b
    y = v.new_empty(rows.total, n, dtype=dtype)
    depth = _depth(v.shape[2], cap)
    u = v[:, 0] if b_weight is None else b_weight
    s = v[..., 0] if a_weight is None else a_weight
    extra = v if bias is None else bias

    def tile(config: Config) -> tuple[int, int]:
        return min(_tile(rows.total), config.rows), min(_tile(n), config.columns)

    def programs(config: Config) -> int:
        block, columns = tile(config)
        return _up(rows.total, block) * _up(n, columns)

    def run(config: Config) -> None:
        block, columns = tile(config)
        _launch(
            _contract, programs(config),
            a_, c, v, u, s, extra, rows.keys, y, rows.total, rows.per_task, *v.shape[1:], n,
            *a_.stride(), *c.stride(), *v.stride(), *u.stride(), *s.stride(), extra.stride(0),
            A_TASK=a_task, C_TASK=c_task, RAGGED=rows.keys is not None,
            HAS_U=b_weight is not None, HAS_S=a_weight is not None, HAS_BIAS=bias is not None,
            **_arithmetic(v.dtype), BM=block, BN=columns, BK=depth,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    _run(table, programs, run, ("contract", v.dtype, v.shape, _power(rows.total), dtype), v.device)
    return y


def _sum_outer(a: Operand, b: Operand, c: Operand, y: Tensor, rows: Rows) -> None:
    """Writes ``y[i,j,k] = sum_r a[r,i] b[r,j] c[r,k]`` into ``y (I, J, K)`` of any strides."""
    # The longer of two operands goes innermost; the third, which the left pair is multiplied with,
    # is the contiguous one unless it is narrow (the head's bias has a single feature).
    if y.shape[2] < 16 and max(y.shape[:2]) > y.shape[2]:
        longest = int(y.shape[1] < y.shape[0])
        a, b, c, y = (c, a, b, y.permute(2, 0, 1)) if not longest else (c, b, a, y.permute(2, 1, 0))
    if y.shape[0] > y.shape[1]:
        a, b, y = b, a, y.transpose(0, 1)
    shape = y.shape
    (a_, a_task), (b_, b_task), (c_, c_task) = a, b, c
    kind = plans.arithmetic(y.dtype)
    total_dtype = torch.promote_types(y.dtype, torch.float32)

    def tile(config: Config) -> tuple[int, int, int]:
        inner = min(_power(shape[1]), config.rows)
        outer = min(config.rows // inner, max(_power(shape[0]), 16 // inner))
        return outer, inner, min(_tile(shape[2]), config.columns)

    def split(config: Config) -> tuple[int, int]:
        """Tiles, and the parts of the rows that fill the device; they are summed in their order."""
        outer, inner, columns = tile(config)
        tiles = _up(shape[0], outer) * _up(shape[1], inner) * _up(shape[2], columns)
        parts = 2 * _multiprocessors(y.device) // max(tiles, 1)
        return tiles, max(min(parts, rows.total // (8 * config.depth), MOST_PARTS), 1)

    def programs(config: Config) -> int:
        tiles, parts = split(config)
        return tiles * parts

    def run(config: Config) -> None:
        outer, inner, columns = tile(config)
        _, parts = split(config)
        chunk = _up(_up(rows.total, parts), config.depth) * config.depth
        out = y.unsqueeze(0)
        if parts > 1:
            out = y.new_empty(parts, *shape, dtype=total_dtype)
        _launch(
            _outer, programs(config),
            a_, b_, c_, rows.keys, out, rows.total, rows.per_task, chunk, *shape,
            *a_.stride(), *b_.stride(), *c_.stride(), *out.stride(),
            A_TASK=a_task, B_TASK=b_task, C_TASK=c_task, RAGGED=rows.keys is not None,
            **_arithmetic(y.dtype), BA=outer, BB=inner, BC=columns, BR=config.depth,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if parts > 1:
            y.copy_(out.sum(0))

    _run(OUTER[kind], programs, run, ("outer", y.dtype, shape, _power(rows.total)), y.device)


# Parts of the rows that are summed apart: bounds the memory of their sums.
MOST_PARTS = 16

# Whether to time the configurations at the first call of a size, instead of taking the default.
AUTOTUNE = os.environ.get("HYPERFAST_AUTOTUNE") == "1"
tuned: dict[tuple, Config] = {}


def _run(
    table: Sequence[Config],
    programs: Callable[[Config], int],
    run: Callable[[Config], None],
    key: tuple,
    device: torch.device,
) -> None:
    """Runs the largest tile that gives three quarters of the multiprocessors a program, else the
    smallest tile; or, when tuning, the one that was fastest for this key."""
    enough = 3 * _multiprocessors(device) // 4
    config = tuned.get(key) or next((c for c in table if programs(c) >= enough), table[-1])
    if AUTOTUNE and key not in tuned and not _capturing():
        config = tuned[key] = min(table, key=lambda c: _milliseconds(lambda: run(c)))
    run(config)


def _capturing() -> bool:
    return not INTERPRETED and torch.cuda.is_current_stream_capturing()


def _milliseconds(call: Callable[[], None], repeats: int = 5) -> float:
    """The median of a few launches, after one that compiles."""
    call()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in events)


def _launch(kernel: Any, programs: int, first: Tensor, *args: Any, **options: Any) -> None:
    if programs:
        with nullcontext() if INTERPRETED else torch.cuda.device(first.device):
            kernel[(programs,)](first, *args, **options)


def _rows(rows: list[Tensor], per_task: list[Tensor], task_ids: Tensor | None, tasks: int) -> Rows:
    """The rows, after a check that all arguments speak of the same ones.

    Raises:
        ValueError: they do not.
        IndexError: an id is out of range (on a GPU, a device-side assertion).
    """
    checks.fitting(rows, per_task, tasks, task_ids)
    if task_ids is None:
        return Rows(tasks * rows[0].shape[1], rows[0].shape[1], None)
    if task_ids.dtype != torch.int64 or task_ids.device != rows[0].device:
        raise TypeError(
            f"task_ids must be int64 on {rows[0].device}, got {task_ids.dtype} on {task_ids.device}"
        )
    if INTERPRETED:
        checks.in_range(task_ids, tasks)
    keys = torch.empty(task_ids.shape, dtype=torch.int32, device=task_ids.device)
    _launch(_keys, _up(len(keys), 1024), task_ids.contiguous(), keys, len(keys), tasks, BLOCK=1024)
    return Rows(len(keys), 1, keys)


def _blocks(h: Tensor, params: int) -> Iterator[slice]:
    """Slices of the tasks, whose ``params`` generated weights each fit half of the cache."""
    step = max(1, plans.GPU_BLOCK // (h.element_size() * max(params, 1)))
    return (slice(t, min(t + step, len(h))) for t in range(0, len(h), step))


def _agree(**tensors: Tensor | None) -> None:
    """One dtype, one device: a kernel trusts both."""
    given = {name: t for name, t in tensors.items() if t is not None}
    name, first = next(iter(given.items()))
    for other, t in given.items():
        if t.dtype != first.dtype or t.device != first.device:
            raise TypeError(
                f"{other} must be of {name}'s dtype and device, {first.dtype} on {first.device}, "
                f"got {t.dtype} on {t.device}"
            )


def _expect(t: Tensor | None, name: str, shape: Sequence[int]) -> None:
    if t is not None and t.shape != torch.Size(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")


def _choose(
    x: Tensor, tasks: int, out: int, ins: int, features: int, task_ids: Tensor | None
) -> str:
    rows = x.shape[:-1].numel()
    layer = plans.Layer(tasks, rows, ins, out, features, ragged=task_ids is not None)
    return plans.choose(layer, x.element_size(), plans.arithmetic(x.dtype))


def _arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """16-bit products are summed in fp32; fp32 ones are rounded to TF32 where PyTorch's are."""
    return {
        "SUM": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if plans.arithmetic(dtype) == "tf32" else "ieee",
    }


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _up(n: int, size: int) -> int:
    """Blocks of ``size`` that cover ``n``."""
    return -(-n // size)


def _power(n: int) -> int:
    """The power of two at or above ``n``, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def _tile(n: int) -> int:
    """The same, at least the 16 of a matrix unit."""
    return max(_power(n), 16)


def _depth(n: int, most: int) -> int:
    """The depth of one product for a sum of ``n`` terms: the least padding, where one product
    costs its depth and 16 more."""
    depths = [d for d in (128, 64, 32, 16) if d <= most]
    return min(depths, key=lambda d: _up(n, d) * (d + 16))
