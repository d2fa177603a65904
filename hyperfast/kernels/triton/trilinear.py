"""A generated layer and its derivatives, whose weights are never stored.

A layer is the trilinear form ``y[r,n] = sum_jk v[n,j,k] c[r,j] a[r,k]``, and so is each of its
derivatives. Two kernels cover the family:

``_contract``  y from v, a, c: weights are generated as sums of a matrix product, and applied there
``_outer``     the gradient of v, summed over rows by the program that owns the tile

On Hopper a product whose left operand is in registers is not safe: assemblers before 13.3 may
overwrite these while the tensor cores still read them. So both operands of every product come from
memory, or what a kernel has formed itself is the right operand, which lies in shared memory always.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperfast.kernels.triton import launch
from hyperfast.kernels.triton.activation import NOTHING, Finish, finish
from hyperfast.kernels.triton.launch import Config, Rows, deep, entry, power, tile, up
from hyperfast.plans import gpu


@triton.jit
def _pack(v, y, N, J, K, v_n, v_j, v_k, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """``y[n,j,k] = v[n,j,k]``, rows ``WIDTH`` apart and filled up with 0. Reads and writes go along
    what is contiguous in each."""
    blocks = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0)
    j, pid = (pid % J).to(tl.int64), pid // J
    n = (pid % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = (pid // blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = (k < K)[:, None] & (n < N)[None, :]
    block = tl.trans(tl.load(v + k[:, None] * v_k + n[None, :] * v_n + j * v_j, mask, 0.0))
    mask = (n < N)[:, None] & (k < WIDTH)[None, :]
    tl.store(y + (n[:, None] * J + j) * WIDTH + k[None, :], block, mask)


@triton.jit
def generate(
    total, a_tile, c_tile, v, j0, k0, J, K, N, v_n, v_j, v_k,
    PRECISION: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, FULL: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Adds ``sum_jk v[n,j,k] c[r,j] a[r,k]`` over a block of ``j`` and of ``k`` to ``total``, a
    column each for the first outputs ``n``, in groups.

    A step generates the weights of one group of outputs for every row, ``sum_k v[n,j,k] a[r,k]``,
    and applies them where they are, in the sums of the product: nothing is rounded in between, and
    its left operand stays in shared memory while the outputs pass.
    """
    STEPS: tl.constexpr = total.shape[1]
    G: tl.constexpr = total.shape[2]
    q = tl.arange(0, G * BJ)
    n, j, k = q // BJ, j0 + q % BJ, k0 + tl.arange(0, BK)
    at = (n.to(INDEX) * v_n + j.to(INDEX) * v_j)[None, :] + k.to(INDEX)[:, None] * v_k
    step = tl.arange(0, STEPS)
    # K is not below 0, which the compiler does not know: it would unroll a few steps.
    for s in range(tl.minimum(tl.cdiv(N, G), STEPS) + tl.minimum(K, 0)):
        if FULL:
            v_tile = tl.load(v + at)
        else:
            v_tile = tl.load(v + at, (k < K)[:, None] & ((j < J) & (n < N - s * G))[None, :], 0.0)
        made = tl.dot(a_tile, v_tile, input_precision=PRECISION, out_dtype=total.dtype)
        made = tl.reshape(made, (total.shape[0], G, BJ))
        sums = tl.sum(made * c_tile.to(total.dtype)[:, None, :], 2)
        total = tl.where((step == s)[None, :, None], total + sums[:, None, :], total)
        v += tl.cast(v_n, tl.int64) * G
    return total


@triton.jit
def product(
    total, a_row, u, live, n, K, N, a_k, u_n, u_k, PRECISION: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Adds ``sum_k u[n,k] a[r,k]`` to ``total``."""
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        a_tile = tl.load(
            a_row + k[None, :].to(tl.int64) * a_k, live[:, None] & (k < K)[None, :], 0.0
        )
        u_tile = tl.load(
            u + n[None, :].to(tl.int64) * u_n + k[:, None].to(tl.int64) * u_k,
            (k < K)[:, None] & (n < N)[None, :],
            0.0,
        )
        total = tl.dot(a_tile, u_tile, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit(do_not_specialize=["rows", "per_task"])
def _contract(
    a, c, v, u, s, bias, keys, pre, y, rows, per_task, J, K, FILLED, N,
    a_r, a_k, c_r, c_j, v_n, v_j, v_k, u_n, u_k, s_n, s_j, bias_n,
    A_TASK: tl.constexpr, C_TASK: tl.constexpr, RAGGED: tl.constexpr,
    HAS_U: tl.constexpr, HAS_S: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, KEEP: tl.constexpr, SLOPE: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
    FULL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """``y[r,n] = sum_jk v[n,j,k] c[r,j] a[r,k] + u[n,:] a[r,:] + s[n,:] c[r,:] + bias[n]``,
    and what follows. Rows of ``v`` are ``FILLED`` long: past ``K`` they are 0."""
    blocks = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    r = (pid // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    n0 = pid % blocks * BN
    n = n0 + tl.arange(0, BN)
    live, inside = r < rows, n < N
    a_row = (a + entry(r, keys, per_task, live, A_TASK, RAGGED) * a_r)[:, None]
    c_row = (c + entry(r, keys, per_task, live, C_TASK, RAGGED) * c_r)[:, None]
    total = tl.zeros((BM, BN // G, G), SUM)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        a_tile = tl.load(
            a_row + k[None, :].to(tl.int64) * a_k, live[:, None] & (k < K)[None, :], 0.0
        )
        for j0 in range(0, J, BJ):
            j = j0 + tl.arange(0, BJ)
            c_tile = tl.load(
                c_row + j[None, :].to(tl.int64) * c_j, live[:, None] & (j < J)[None, :], 0.0
            )
            total = generate(
                total, a_tile, c_tile, v + n0.to(tl.int64) * v_n, j0, k0, J, FILLED, N - n0,
                v_n, v_j, v_k, PRECISION, BJ, BK, FULL, INDEX,
            )  # fmt: skip
    y_tile = tl.reshape(total, (BM, BN))
    if HAS_U:
        y_tile = product(y_tile, a_row, u, live, n, K, N, a_k, u_n, u_k, PRECISION, BK)
    if HAS_S:
        y_tile = product(y_tile, c_row, s, live, n, J, N, c_j, s_n, s_j, PRECISION, BK)
    if HAS_BIAS:
        y_tile += tl.load(bias + n.to(tl.int64) * bias_n, inside, 0.0).to(SUM)[None, :]
    at, mask = r[:, None] * N + n[None, :], live[:, None] & inside[None, :]
    y_tile = finish(y_tile, pre, at, mask, ACTIVATION, PARAMETER, KEEP, SLOPE)
    tl.store(y + at, y_tile.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows", "chunk"])
def _outer(
    a, b, c, keys, y, rows, per_task, chunk, A, B, C,
    a_r, a_n, b_r, b_n, c_r, c_n, y_s, y_a, y_b, y_c,
    A_TASK: tl.constexpr, B_TASK: tl.constexpr, C_TASK: tl.constexpr, RAGGED: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
    BA: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``y[s,i,j,k] = sum_r a[r,i] b[r,j] c[r,k]`` over the ``chunk`` rows of part ``s``.

    A program owns a tile of ``BC`` by ``BA * BB``. Its right operand is formed.
    """
    blocks_b, blocks_c = tl.cdiv(B, BB), tl.cdiv(C, BC)
    blocks = tl.cdiv(A, BA) * blocks_b * blocks_c
    pid = tl.program_id(0)
    part, pid = (pid // blocks).to(tl.int64), pid % blocks
    i = pid // (blocks_b * blocks_c) * BA + tl.arange(0, BA)
    j = pid // blocks_c % blocks_b * BB + tl.arange(0, BB)
    k = pid % blocks_c * BC + tl.arange(0, BC)
    a_column = i.to(tl.int64)[None, :] * a_n
    b_column = j.to(tl.int64)[None, :] * b_n
    c_column = k.to(tl.int64)[:, None] * c_n
    last = tl.minimum((part + 1) * chunk, rows)
    total = tl.zeros((BC, BA * BB), SUM)
    for r0 in range(part * chunk, last, BR):
        r = r0 + tl.arange(0, BR)
        live = r < last
        a_row = a + entry(r, keys, per_task, live, A_TASK, RAGGED) * a_r
        b_row = b + entry(r, keys, per_task, live, B_TASK, RAGGED) * b_r
        c_row = c + entry(r, keys, per_task, live, C_TASK, RAGGED) * c_r
        a_tile = tl.load(a_row[:, None] + a_column, live[:, None] & (i < A)[None, :], 0.0)
        b_tile = tl.load(b_row[:, None] + b_column, live[:, None] & (j < B)[None, :], 0.0)
        c_tile = tl.load(c_row[None, :] + c_column, (k < C)[:, None] & live[None, :], 0.0)
        # What the matrix unit takes is of the inputs' type: of fp16 a pair above 65504 overflows,
        # in whatever precision it is formed.
        pairs = tl.reshape(a_tile[:, :, None] * b_tile[:, None, :], (BR, BA * BB))
        total = tl.dot(c_tile, pairs, total, input_precision=PRECISION, out_dtype=SUM)
    q = tl.arange(0, BA * BB)
    i = pid // (blocks_b * blocks_c) * BA + q // BB
    j = pid // blocks_c % blocks_b * BB + q % BB
    y_column = y + part * y_s + i.to(tl.int64) * y_a + j.to(tl.int64) * y_b
    tl.store(
        y_column[None, :] + k.to(tl.int64)[:, None] * y_c,
        total.to(y.dtype.element_ty),
        (k < C)[:, None] & ((i < A) & (j < B))[None, :],
    )


# By kind of arithmetic, largest tile first: a large tile reads what is shared less often, a small
# one fills the device with few rows. Columns are outputs. A product is waited for before it is
# applied: at 128 registers a thread two programs of 8 warps share a multiprocessor of a Hopper, and
# one multiplies while the other applies.
CONTRACT = {
    "half": (
        Config(128, 16, 64, 8, 3, 128, 128),
        Config(64, 16, 64, 4, 3, 128),
        Config(16, 16, 64, 4, 3, 128),
    ),
    "tf32": (
        Config(128, 16, 32, 8, 3, 64, 128),
        Config(64, 16, 32),
        Config(16, 16, 32),
    ),
    "fp32": (Config(64, 16, 16, 8, 2), Config(16, 16, 16, 4, 2)),
    "fp64": (Config(64, 16, 16, 8, 2), Config(32, 16, 16, 4, 2), Config(16, 16, 16, 4, 2)),
}
WIDEST = 64  # of what is applied: a block of it stays in registers
# One size each, for the rows are split to fill the device.
OUTER = {
    "half": (Config(256, 64, 32, 8, 2),),
    "tf32": (Config(256, 64, 32, 8, 2),),
    "fp32": (Config(128, 64, 16, 8, 2),),
    "fp64": (Config(32, 32, 16, 4, 2),),
}

# Parts of the rows that are summed apart: bounds the memory of their sums.
MOST_PARTS = 16
# Rows from which a copy of the head pays whose rows are contiguous and begin at multiples of 16.
PACK = 256

# An operand: its rows, and whether they belong to tasks instead.
Operand = tuple[Tensor, bool]


def groups(outputs: int, applied: int, columns: int, width: int) -> tuple[int, int]:
    """Outputs a step, and what is applied to each: a product's width in all, 16 at least."""
    block = min(power(applied), WIDEST)
    return min(max(width // block, 1), max(power(outputs), 16 // block), columns), block


def packed(v: Tensor, rows: int) -> Tensor:
    """``v (N, J, K)``, or a copy whose rows are contiguous and filled up with 0 to a multiple of
    16, where the kernel would read ``v`` itself in narrow pieces for many rows."""
    n, j, k = v.shape
    if rows < PACK or (v.stride(2) == 1 and not (v.stride(0) | v.stride(1)) % 16):
        return v
    y = v.new_empty(n, j, 16 * up(k, 16))
    width = y.shape[2]
    launch.start(
        _pack, j * up(n, 64) * up(width, 64), v, y, n, j, k, *v.stride(), WIDTH=width, BLOCK=64
    )
    return y


def trilinear(
    a: Operand,
    b: Operand,
    v: Tensor,
    a_weight: Tensor | None,
    b_weight: Tensor | None,
    bias: Tensor | None,
    rows: Rows,
    dtype: torch.dtype,
    then: Finish = NOTHING,
) -> Tensor:
    """``(R, N)``: ``y[r,n] = sum_ij v[n,i,j] a[r,i] b[r,j]`` and what is linear in ``a``, in ``b``,
    and constant: ``a_weight (N, I)``, ``b_weight (N, J)``, ``bias (N,)``; and what follows.
    """
    n, i, j = v.shape
    table = CONTRACT[gpu.arithmetic(v.dtype)]

    def work(applied: int, dotted: int) -> int:
        block, depth = min(power(applied), WIDEST), deep(dotted, table[0].depth)
        return up(applied, block) * block * up(dotted, depth) * (depth + 16)

    # The kernel multiplies along one of the two and applies the other. Where both cost the same,
    # it multiplies along the one that is contiguous.
    along_i, along_j = work(j, i), work(i, j)
    if along_j > along_i or (along_j == along_i and v.stride(1) == 1):
        a, b, v, a_weight, b_weight = b, a, v.mT, b_weight, a_weight
    (c, c_task), (a_, a_task) = a, b
    _, applied, dotted = v.shape
    y = v.new_empty(rows.total, n, dtype=dtype)
    depth = deep(dotted, table[0].depth)
    u = v[:, 0] if b_weight is None else b_weight
    s = v[..., 0] if a_weight is None else a_weight
    extra = v if bias is None else bias
    v = packed(v, rows.total)

    def cut(config: Config) -> tuple[int, int]:
        return min(tile(rows.total), config.rows), min(tile(n), config.columns)

    def programs(config: Config) -> int:
        block, columns = cut(config)
        return up(rows.total, block) * up(n, columns)

    def run(config: Config) -> None:
        block, columns = cut(config)
        group, along = groups(n, applied, columns, config.width)
        launch.start(
            _contract, programs(config),
            a_, c, v, u, s, extra, rows.keys, then.pre, y, rows.total, rows.per_task,
            applied, dotted, v.shape[2], n,
            *a_.stride(), *c.stride(), *v.stride(), *u.stride(), *s.stride(), extra.stride(0),
            A_TASK=a_task, C_TASK=c_task, RAGGED=rows.ragged,
            HAS_U=b_weight is not None, HAS_S=a_weight is not None, HAS_BIAS=bias is not None,
            **then.options(), **launch.arithmetic(v.dtype),
            BM=block, BN=columns, BJ=along, BK=depth, G=group,
            FULL=not (n % group or applied % along or v.shape[2] % depth),
            INDEX=launch.index(v),
            **config.options(y.device),
        )  # fmt: skip

    key = "contract", v.dtype, v.shape, applied, dotted, power(rows.total), dtype
    launch.run(table, programs, run, key, v.device)
    return y


def sum_outer(a: Operand, b: Operand, c: Operand, y: Tensor, rows: Rows) -> None:
    """Writes ``y[i,j,k] = sum_r a[r,i] b[r,j] c[r,k]`` into ``y (I, J, K)`` of any strides."""
    # The longer of two operands goes innermost; the third, which their pairs are multiplied with,
    # is the contiguous one unless it is narrow.
    if y.shape[2] < 16 and max(y.shape[:2]) > y.shape[2]:
        longest = int(y.shape[1] < y.shape[0])
        a, b, c, y = (c, a, b, y.permute(2, 0, 1)) if not longest else (c, b, a, y.permute(2, 1, 0))
    if y.shape[0] > y.shape[1]:
        a, b, y = b, a, y.transpose(0, 1)
    shape = y.shape
    (a_, a_task), (b_, b_task), (c_, c_task) = a, b, c
    kind = gpu.arithmetic(y.dtype)
    total_dtype = torch.promote_types(y.dtype, torch.float32)

    def cut(config: Config) -> tuple[int, int, int]:
        # A square tile reads least; a product of TF32 is 32 pairs wide at least.
        outer = min(power(shape[0]), 1 << config.rows.bit_length() // 2)
        inner = max(min(power(shape[1]), config.rows // outer), 32 // outer)
        outer = min(power(shape[0]), config.rows // inner)
        return outer, inner, min(tile(shape[2]), config.columns)

    def split(config: Config) -> tuple[int, int]:
        """Tiles, and the parts of the rows that fill the device; they are summed in their order."""
        outer, inner, columns = cut(config)
        tiles = up(shape[0], outer) * up(shape[1], inner) * up(shape[2], columns)
        parts = 2 * launch.multiprocessors(y.device) // max(tiles, 1)
        return tiles, max(min(parts, rows.total // (8 * config.depth), MOST_PARTS), 1)

    def programs(config: Config) -> int:
        tiles, parts = split(config)
        return tiles * parts

    def run(config: Config) -> None:
        outer, inner, columns = cut(config)
        _, parts = split(config)
        chunk = up(up(rows.total, parts), config.depth) * config.depth
        out = y.unsqueeze(0)
        if parts > 1:
            out = y.new_empty(parts, *shape, dtype=total_dtype)
        launch.start(
            _outer, programs(config),
            a_, b_, c_, rows.keys, out, rows.total, rows.per_task, chunk, *shape,
            *a_.stride(), *b_.stride(), *c_.stride(), *out.stride(),
            A_TASK=a_task, B_TASK=b_task, C_TASK=c_task, RAGGED=rows.ragged,
            **launch.arithmetic(y.dtype), BA=outer, BB=inner, BC=columns, BR=config.depth,
            **config.options(y.device),
        )  # fmt: skip
        if parts > 1:
            y.copy_(out.sum(0))

    launch.run(OUTER[kind], programs, run, ("outer", y.dtype, shape, power(rows.total)), y.device)
