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

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyperfast.kernels.triton import launch
from hyperfast.kernels.triton.activation import NOTHING, Finish, finish
from hyperfast.kernels.triton.launch import Config, Rows, deep, entry, power, tile, up
from hyperfast.kernels.triton.parts import in_parts, load, multiply, packed, rounded, split
from hyperfast.plans import gpu


@triton.jit
def again(j, J, BJ: tl.constexpr):
    """``j``, or past the last of ``J`` one that comes twice: a tile of ``BJ`` before it, or where
    there is but one tile, ``J`` before it. A 0 there would meet infinities, and make them NaN; to
    mask sums takes a quarter to a half as many instructions again. ``BJ`` is below twice ``J``."""
    return tl.where(j < J, j, j - tl.minimum(J, BJ))


@triton.jit
def share(c, j, J, BJ: tl.constexpr, SUM: tl.constexpr):
    """What of ``c`` counts: half where it comes twice. Half an odd subnormal number of 32 bits is
    rounded: what is past ``J`` counts the rest."""
    other = j + tl.minimum(J, BJ)
    twice = (j >= J) | ((other >= J) & (other < tl.cdiv(J, BJ) * BJ))
    if c.dtype.primitive_bitwidth > 16:
        half = c * 0.5
        rest = tl.where(half == c, c, c - half)  # infinity less infinity would be NaN
        part = tl.where(twice, tl.where(j < J, half, rest), c)
    else:
        part = c.to(SUM) * tl.where(twice, 0.5, 1.0)
    return part


@triton.jit
def generate(
    total, a, a2, a3, c_tile, v, step, j0, k0, J, K, N, v_n, v_j, v_k,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
    FULL: tl.constexpr, MASK: tl.constexpr, TWICE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Adds ``sum_jk v[n,j,k] c[r,j] a[r,k]`` over a block of ``j`` and of ``k`` to ``total``, a
    column each for the first outputs ``n``, in groups. ``a`` may come in parts, and ``v`` with it,
    which are ``step`` elements apart. With ``TWICE``, some ``j`` come :func:`again`.

    A turn generates the weights of one group of outputs for every row, ``sum_k v[n,j,k] a[r,k]``,
    and applies them where they are, in the sums of the product: nothing is rounded in between, and
    its left operand stays in shared memory while the outputs pass.
    """
    TURNS: tl.constexpr = total.shape[1]
    G: tl.constexpr = total.shape[2]
    q = tl.arange(0, G * BJ)
    n, j, k = q // BJ, j0 + q % BJ, k0 + tl.arange(0, BK)
    if TWICE:
        j = again(j, J, BJ)
    at = (n.to(INDEX) * v_n + j.to(INDEX) * v_j)[None, :] + k.to(INDEX)[:, None] * v_k
    turn = tl.arange(0, TURNS)
    # K is not below 0, which the compiler does not know: it would unroll a few turns.
    for s in range(tl.minimum(tl.cdiv(N, G), TURNS) + tl.minimum(K, 0)):
        mask = (k < K)[:, None] & ((j < J) & (n < N - s * G))[None, :]
        b, b2, b3 = load(v + at, step, mask, PARTS, FULL)
        made = multiply(a, a2, a3, b, b2, b3, PARTS, total.dtype, PRECISION)
        if MASK:  # infinity times the zeros past J
            made = tl.where((j < J)[None, :], made, 0.0)
        made = tl.reshape(made, (total.shape[0], G, BJ))
        sums = tl.sum(made * c_tile.to(total.dtype)[:, None, :], 2)
        total = tl.where((turn == s)[None, :, None], total + sums[:, None, :], total)
        v += tl.cast(v_n, tl.int64) * G
    return total


@triton.jit
def product(
    total, a_row, u, live, n, K, N, a_k, u_n, u_k, PRECISION: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Adds ``sum_k u[n,k] a[r,k]`` to ``total``: never in parts, as it is little work."""
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
    a, c, a_parts, v, u, s, bias, keys, pre, y, rows, per_task, J, K, FILLED, N,
    a_r, a_k, c_r, c_j, a_step, a_parts_r, a_parts_k, v_step, v_n, v_j, v_k,
    u_n, u_k, s_n, s_j, bias_n,
    A_TASK: tl.constexpr, C_TASK: tl.constexpr, RAGGED: tl.constexpr,
    HAS_U: tl.constexpr, HAS_S: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, KEEP: tl.constexpr, SLOPE: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr,
    G: tl.constexpr, FULL: tl.constexpr, TWICE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """``y[r,n] = sum_jk v[n,j,k] c[r,j] a[r,k] + u[n,:] a[r,:] + s[n,:] c[r,:] + bias[n]``,
    and what follows. ``v``, and ``a`` where it is multiplied with ``v``, come in parts. Rows of
    ``v`` are ``FILLED`` long: past ``K`` they are 0."""
    blocks = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    r = (pid // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    n0 = pid % blocks * BN
    n = n0 + tl.arange(0, BN)
    live, inside = r < rows, n < N
    owner = entry(r, keys, per_task, live, A_TASK, RAGGED)
    a_row, part_row = (a + owner * a_r)[:, None], (a_parts + owner * a_parts_r)[:, None]
    c_row = (c + entry(r, keys, per_task, live, C_TASK, RAGGED) * c_r)[:, None]
    total = tl.zeros((BM, BN // G, G), SUM)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        mask = live[:, None] & (k < K)[None, :]
        at = k[None, :].to(tl.int64) * a_parts_k
        a1, a2, a3 = load(part_row + at, a_step, mask, PARTS, False)
        for j0 in range(0, J, BJ):
            j = j0 + tl.arange(0, BJ)
            i = again(j, J, BJ) if TWICE else j
            c_tile = tl.load(
                c_row + i[None, :].to(tl.int64) * c_j, live[:, None] & (i < J)[None, :], 0.0
            )
            if TWICE:
                c_tile = share(c_tile, j[None, :], J, BJ, SUM)
            total = generate(
                total, a1, a2, a3, c_tile, v + n0.to(tl.int64) * v_n, v_step, j0, k0, J, FILLED,
                N - n0, v_n, v_j, v_k, PARTS, PRECISION, BJ, BK, FULL, False, TWICE, INDEX,
            )  # fmt: skip
    y_tile = tl.reshape(total, (BM, BN))
    if HAS_U:
        y_tile = product(y_tile, a_row, u, live, n, K, N, a_k, u_n, u_k, PRECISION, BL)
    if HAS_S:
        y_tile = product(y_tile, c_row, s, live, n, J, N, c_j, s_n, s_j, PRECISION, BL)
    if HAS_BIAS:
        y_tile += tl.load(bias + n.to(tl.int64) * bias_n, inside, 0.0).to(SUM)[None, :]
    at, mask = r[:, None] * N + n[None, :], live[:, None] & inside[None, :]
    y_tile = finish(y_tile, pre, at, mask, ACTIVATION, PARAMETER, KEEP, SLOPE)
    tl.store(y + at, y_tile.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows", "chunk"])
def _outer(
    a, b, c, keys, y, rows, per_task, chunk, A, B, C,
    a_r, a_n, b_r, b_n, c_step, c_r, c_n, y_s, y_a, y_b, y_c,
    A_TASK: tl.constexpr, B_TASK: tl.constexpr, C_TASK: tl.constexpr, RAGGED: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
    PARTS: tl.constexpr, ROUNDED: tl.constexpr,
    BA: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``y[s,i,j,k] = sum_r a[r,i] b[r,j] c[r,k]`` over the ``chunk`` rows of piece ``s``.

    A program owns a tile of ``BC`` by ``BA * BB``. Its right operand is formed; where it is
    multiplied in parts, ``c`` comes in parts. Of fp16 a pair may be above 65504: it stays fp32, as
    ``c`` is then, ``ROUNDED`` to the digits of fp16.
    """
    blocks_b, blocks_c = tl.cdiv(B, BB), tl.cdiv(C, BC)
    blocks = tl.cdiv(A, BA) * blocks_b * blocks_c
    pid = tl.program_id(0)
    piece, pid = (pid // blocks).to(tl.int64), pid % blocks
    i = pid // (blocks_b * blocks_c) * BA + tl.arange(0, BA)
    j = pid // blocks_c % blocks_b * BB + tl.arange(0, BB)
    k = pid % blocks_c * BC + tl.arange(0, BC)
    a_column = i.to(tl.int64)[None, :] * a_n
    b_column = j.to(tl.int64)[None, :] * b_n
    c_column = k.to(tl.int64)[:, None] * c_n
    last = tl.minimum((piece + 1) * chunk, rows)
    total = tl.zeros((BC, BA * BB), SUM)
    for r0 in range(piece * chunk, last, BR):
        r = r0 + tl.arange(0, BR)
        live = r < last
        a_row = a + entry(r, keys, per_task, live, A_TASK, RAGGED) * a_r
        b_row = b + entry(r, keys, per_task, live, B_TASK, RAGGED) * b_r
        c_row = c + entry(r, keys, per_task, live, C_TASK, RAGGED) * c_r
        a_tile = tl.load(a_row[:, None] + a_column, live[:, None] & (i < A)[None, :], 0.0)
        b_tile = tl.load(b_row[:, None] + b_column, live[:, None] & (j < B)[None, :], 0.0)
        mask = (k < C)[:, None] & live[None, :]
        c1, c2, c3 = load(c_row[None, :] + c_column, c_step, mask, PARTS, False)
        if ROUNDED:
            a_tile, b_tile = a_tile.to(tl.float32), b_tile.to(tl.float32)
        pairs = tl.reshape(a_tile[:, :, None] * b_tile[:, None, :], (BR, BA * BB))
        if ROUNDED:
            pairs = rounded(pairs)
        if PARTS > 1:
            p1, p2, p3 = split(pairs, PARTS)
            KIND: tl.constexpr = c.dtype.element_ty
            total += multiply(
                c1, c2, c3, p1.to(KIND), p2.to(KIND), p3.to(KIND), PARTS, SUM, PRECISION
            )
        else:
            total = tl.dot(c1, pairs, total, input_precision=PRECISION, out_dtype=SUM)
    q = tl.arange(0, BA * BB)
    i = pid // (blocks_b * blocks_c) * BA + q // BB
    j = pid // blocks_c % blocks_b * BB + q % BB
    y_column = y + piece * y_s + i.to(tl.int64) * y_a + j.to(tl.int64) * y_b
    tl.store(
        y_column[None, :] + k.to(tl.int64)[:, None] * y_c,
        total.to(y.dtype.element_ty),
        (k < C)[:, None] & ((i < A) & (j < B))[None, :],
    )


# By kind of arithmetic, largest tile first: a large tile reads what is shared less often, a small
# one fills the device with few rows. Columns are outputs. A product is waited for before it is
# applied: at 128 registers a thread two programs of 8 warps share a multiprocessor of a Hopper, and
# one multiplies while the other applies. Parts of 64 features and few weights take as much shared
# memory as 32 features of many weights, which would be applied twice.
CONTRACT = {
    "half": (
        Config(128, 16, 64, 8, 3, 128, 128),
        Config(64, 16, 64, 4, 3, 128),
        Config(16, 16, 64, 4, 3, 128),
    ),
    "bf16x6": (
        Config(128, 16, 64, 8, 2, 64, 128),
        Config(64, 16, 64, 4, 2),
        Config(16, 16, 64, 4, 2),
    ),
    "tf32": (
        Config(128, 16, 32, 8, 3, 64, 128),
        Config(64, 16, 32),
        Config(16, 16, 32),
    ),
    "fp32": (Config(64, 16, 16, 8, 2), Config(16, 16, 16, 4, 2)),
    "fp64": (Config(64, 16, 16, 8, 2), Config(32, 16, 16, 4, 2), Config(16, 16, 16, 4, 2)),
}
CONTRACT["bf16x1"], CONTRACT["bf16x3"] = CONTRACT["half"], CONTRACT["bf16x6"]
WIDEST = 64  # of what is applied: a block of it stays in registers
# One size each, for the rows are split to fill the device.
OUTER = {
    "half": (Config(256, 64, 32, 8, 2),),
    "bf16x6": (Config(128, 64, 32, 4, 2),),
    "tf32": (Config(256, 64, 32, 8, 2),),
    "fp32": (Config(128, 64, 16, 8, 2),),
    "fp64": (Config(32, 32, 16, 4, 2),),
}

# Pieces of the rows that are summed apart: bounds the memory of their sums.
MOST_PIECES = 16
# Rows from which a copy of the head pays whose rows are contiguous and begin at multiples of 16.
PACK = 256

# An operand: its rows, and whether they belong to tasks instead.
Operand = tuple[Tensor, bool]


@lru_cache(maxsize=4096)
def groups(outputs: int, applied: int, columns: int, width: int) -> tuple[int, int]:
    """Outputs a step, and what is applied to each: a product's width in all, 16 at least."""
    block = min(power(applied), WIDEST)
    return min(max(width // block, 1), max(power(outputs), 16 // block), columns), block


def wide(v: Tensor, rows: int) -> Tensor:
    """``v (N, J, K)``, or a copy where the kernel would read ``v`` itself in narrow pieces for many
    rows."""
    if rows < PACK or (v.stride(2) == 1 and not (v.stride(0) | v.stride(1)) % 16):
        return v
    return packed(v)[0]


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
    numbers = v.numel() + (0 if b_weight is None else b_weight.numel())
    kind = gpu.products(v.dtype, 2 * rows.total * numbers, numbers + b[0].numel())
    table = CONTRACT[kind]

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
    parts = gpu.PARTS.get(kind, 0)
    v = packed(v, parts) if parts else wide(v, rows.total).unsqueeze(0)
    a_parts = in_parts(a_, parts)

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
            a_, c, a_parts, v, u, s, extra, rows.keys, then.pre, y, rows.total, rows.per_task,
            applied, dotted, v.shape[3], n,
            *a_.stride(), *c.stride(), *a_parts.stride(), *v.stride(), *u.stride(), *s.stride(),
            extra.stride(0),
            A_TASK=a_task, C_TASK=c_task, RAGGED=rows.ragged,
            HAS_U=b_weight is not None, HAS_S=a_weight is not None, HAS_BIAS=bias is not None,
            **then.options(), **launch.arithmetic(c.dtype), PARTS=max(parts, 1),
            BM=block, BN=columns, BJ=along, BK=depth, BL=16 if parts else depth, G=group,
            FULL=not (n % group or v.shape[3] % depth), TWICE=bool(applied % along),
            INDEX=launch.index(v[0]),
            **config.options(y.device),
        )  # fmt: skip

    key = "contract", kind, c.dtype, v.shape, applied, dotted, power(rows.total), dtype
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
    kind = gpu.unit(y.dtype)  # to split pairs would take longer than products of TF32
    if kind == "fp32":
        kind = gpu.products(y.dtype, 2 * rows.total * y.numel(), c_.numel())
    if y.dtype == torch.float16:  # TF32 has its digits, and the exponents of fp32
        kind, c_ = "tf32", c_.float()
    parts = gpu.PARTS.get(kind, 0)
    c_parts = in_parts(c_, parts)
    total_dtype = torch.promote_types(y.dtype, torch.float32)

    def cut(config: Config) -> tuple[int, int, int]:
        # A square tile reads least; a product of TF32 is 32 pairs wide at least.
        outer = min(power(shape[0]), 1 << config.rows.bit_length() // 2)
        inner = max(min(power(shape[1]), config.rows // outer), 32 // outer)
        outer = min(power(shape[0]), config.rows // inner)
        return outer, inner, min(tile(shape[2]), config.columns)

    def pieces(config: Config) -> tuple[int, int]:
        """Tiles, and pieces of the rows that fill the device; they are summed in their order."""
        outer, inner, columns = cut(config)
        tiles = up(shape[0], outer) * up(shape[1], inner) * up(shape[2], columns)
        most = min(rows.total // (8 * config.depth), MOST_PIECES)
        return tiles, max(min(2 * launch.multiprocessors(y.device) // max(tiles, 1), most), 1)

    def programs(config: Config) -> int:
        tiles, count = pieces(config)
        return tiles * count

    def run(config: Config) -> None:
        outer, inner, columns = cut(config)
        _, count = pieces(config)
        chunk = up(up(rows.total, count), config.depth) * config.depth
        out = y.unsqueeze(0)
        if count > 1:
            out = y.new_empty(count, *shape, dtype=total_dtype)
        launch.start(
            _outer, programs(config),
            a_, b_, c_parts, rows.keys, out, rows.total, rows.per_task, chunk, *shape,
            *a_.stride(), *b_.stride(), *c_parts.stride(), *out.stride(),
            A_TASK=a_task, B_TASK=b_task, C_TASK=c_task, RAGGED=rows.ragged,
            **launch.arithmetic(y.dtype) | {"PRECISION": "tf32" if kind == "tf32" else "ieee"},
            PARTS=max(parts, 1), ROUNDED=y.dtype == torch.float16,
            BA=outer, BB=inner, BC=columns, BR=config.depth,
            **config.options(y.device),
        )  # fmt: skip
        if count > 1:
            y.copy_(out.sum(0))

    key = "outer", kind, y.dtype, shape, power(rows.total)
    launch.run(OUTER[kind], programs, run, key, y.device)
