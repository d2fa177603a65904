"""fp32 products on matrix units, which multiply bf16 and add up in fp32.

A float is the exact sum of three bf16, ``x = x1 + 2^-8 x2 + 2^-16 x3``. Scaled up like this no part
of a float is subnormal that is not so itself, nor larger than it: every finite number keeps all its
digits. Of the nine products of two such sums the three smallest come to at most 2^-24 of the whole,
as much as one rounding of it, and are left out; six remain (``bf16x6``). With two parts there are
three, and 16 bits of every number (``bf16x3``).

Infinities and NaN are last parts, behind a 1 of their sign. These meet nothing but leading parts,
of which none is 0 unless its number is: so infinity times a number is what it is in fp32. (Numbers
below 2^-134 count as 0 there. Sums overflow from 2^126 on, if absolute values are added up.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperfast.kernels.triton import launch
from hyperfast.kernels.triton.launch import up

# How parts are stored. The interpreter cannot multiply bf16: it sees the same numbers in fp32.
PART = torch.float32 if launch.INTERPRETED else torch.bfloat16


@triton.jit
def _lead(x):
    """The leading 8 bits, rounded to nearest; a finite number stays finite."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    lead = tl.minimum(size + 0x8000, 0x7F7FFFFF) & 0x7FFF0000
    return (bits ^ size | lead).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x):
    """To the 11 bits of TF32, which are those of fp16: the units would cut the others off."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFF) < 0x7F800000, (bits + 0x1000) & -0x2000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def split(x, PARTS: tl.constexpr):
    """Three parts of fp32 numbers, of which the last repeat where there are fewer."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    finite = size < 0x7F800000
    if PARTS == 1:
        first = tl.where(finite, _lead(x), x)
        second = first
        third = first
    else:
        one = (bits ^ size | 0x3F800000).to(tl.float32, bitcast=True)
        first = tl.where(finite, _lead(x), one)
        rest = (x - first) * 256
        second = tl.where(finite, _lead(rest), x if PARTS == 2 else 0.0)
        third = second
        if PARTS == 3:  # 8 bits are left
            third = tl.where(finite, (rest - second) * 256, x)
    return first, second, third


@triton.jit
def load(p, step, mask, PARTS: tl.constexpr, FULL: tl.constexpr):
    """The parts of a block, ``step`` elements apart; the last repeat where there are fewer."""
    first = tl.load(p) if FULL else tl.load(p, mask, 0.0)
    second = first
    third = first
    if PARTS > 1:
        p += step
        second = tl.load(p) if FULL else tl.load(p, mask, 0.0)
    if PARTS > 2:
        p += step
        third = tl.load(p) if FULL else tl.load(p, mask, 0.0)
    return first, second, third


@triton.jit
def multiply(
    a, a2, a3, b, b2, b3, PARTS: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The product of ``a`` and ``b``; of their parts, from small to large."""
    if PARTS > 2:
        y = tl.dot(a3, b, out_dtype=SUM)
        y = tl.dot(a, b3, y, out_dtype=SUM)
        y = tl.dot(a2, b2, y, out_dtype=SUM) * 0.00390625
        y = tl.dot(a2, b, y, out_dtype=SUM)
        y = tl.dot(a, b2, y, out_dtype=SUM) * 0.00390625
        y = tl.dot(a, b, y, out_dtype=SUM)
    elif PARTS > 1:
        y = tl.dot(a2, b, out_dtype=SUM)
        y = tl.dot(a, b2, y, out_dtype=SUM) * 0.00390625
        y = tl.dot(a, b, y, out_dtype=SUM)
    else:
        y = tl.dot(a, b, input_precision=PRECISION, out_dtype=SUM)
    return y


@triton.jit
def _pack(
    v, y, N, J, K, v_n, v_j, v_k, step,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``y[n,j,k] = v[n,j,k]``, rows ``WIDTH`` apart and filled up with 0, or the ``PARTS`` of it,
    ``step`` elements apart. Reads and writes go along what is contiguous in each."""
    blocks = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0)
    j, pid = (pid % J).to(tl.int64), pid // J
    n = (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = (pid // blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = (k < K)[:, None] & (n < N)[None, :]
    block = tl.trans(tl.load(v + k[:, None] * v_k + n[None, :] * v_n + j * v_j, mask, 0.0))
    mask = (n < N)[:, None] & (k < WIDTH)[None, :]
    y += (n[:, None] * J + j) * WIDTH + k[None, :]
    if PARTS == 0:
        tl.store(y, block, mask)
    else:
        first, second, third = split(block.to(tl.float32), PARTS)
        tl.store(y, first.to(y.dtype.element_ty), mask)
        if PARTS > 1:
            y += step
            tl.store(y, second.to(y.dtype.element_ty), mask)
        if PARTS > 2:
            y += step
            tl.store(y, third.to(y.dtype.element_ty), mask)


def packed(v: Tensor, parts: int = 0) -> Tensor:
    """``(max(parts, 1), N, J, K)``: a copy of ``v (N, J, K)``, or its parts, whose rows are
    contiguous and filled up with 0 to a multiple of 16."""
    n, j, k = v.shape
    width = 16 * up(k, 16)
    y = v.new_empty(max(parts, 1), n, j, width, dtype=PART if parts else v.dtype)
    launch.start(
        _pack, j * up(n, 64) * up(width, 64), v, y, n, j, k, *v.stride(), y.stride(0),
        WIDTH=width, BLOCK=64, PARTS=parts,
    )  # fmt: skip
    return y


def in_parts(rows: Tensor, parts: int) -> Tensor:
    """``(max(parts, 1), R, K)``: the parts of ``rows (R, K)``, or those as they are."""
    return packed(rows.unsqueeze(1), parts)[:, :, 0] if parts else rows.unsqueeze(0)
