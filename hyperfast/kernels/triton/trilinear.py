"""A generated layer and its derivatives, whose weights are never stored.

A layer is the trilinear form ``y[r,n] = sum_jk v[n,j,k] c[r,j] a[r,k]``, and so is each of its
derivatives. Two kernels cover the family:

``_contract``  y from v, a, c: a matrix product whose left operand is formed in registers
``_outer``     the gradient of v, summed over rows by the program that owns the tile
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


@triton.jit(do_not_specialize=["rows", "per_task"])
def _contract(
    a, c, v, u, s, bias, keys, pre, y, rows, per_task, J, K, N,
    a_r, a_k, c_r, c_j, v_n, v_j, v_k, u_n, u_k, s_n, s_j, bias_n,
    A_TASK: tl.constexpr, C_TASK: tl.constexpr, RAGGED: tl.constexpr,
    HAS_U: tl.constexpr, HAS_S: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, KEEP: tl.constexpr, SLOPE: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y[r,n] = sum_jk v[n,j,k] c[r,j] a[r,k] + u[n,:] a[r,:] + s[n,:] c[r,:] + bias[n]``,
    and what follows.

    A block of ``a`` stays in registers while ``j`` runs: each step scales its rows by one column of
    ``c`` and multiplies it by one slice of ``v``, so that the Khatri-Rao product is never stored.
    """
    blocks = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    r = (pid // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    n = (pid % blocks) * BN + tl.arange(0, BN)
    n_offset = n.to(tl.int64)[None, :]
    live, inside = r < rows, n < N
    a_row = a + entry(r, keys, per_task, live, A_TASK, RAGGED) * a_r
    c_row = c + entry(r, keys, per_task, live, C_TASK, RAGGED) * c_r
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
    at, mask = r[:, None] * N + n[None, :], live[:, None] & inside[None, :]
    total = finish(total, pre, at, mask, ACTIVATION, PARAMETER, KEEP, SLOPE)
    tl.store(y + at, total.to(y.dtype.element_ty), mask)


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
        a_row = a + entry(r, keys, per_task, live, A_TASK, RAGGED) * a_r
        b_row = b + entry(r, keys, per_task, live, B_TASK, RAGGED) * b_r
        c_row = c + entry(r, keys, per_task, live, C_TASK, RAGGED) * c_r
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

# Parts of the rows that are summed apart: bounds the memory of their sums.
MOST_PARTS = 16

# An operand: its rows, and whether they belong to tasks instead.
Operand = tuple[Tensor, bool]


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
    cap = table[0].depth

    def work(looped: int, dotted: int) -> int:
        depth = deep(dotted, cap)
        return looped * up(dotted, depth) * (depth + 16)

    # The kernel multiplies along one of the two and loops over the other. Where both cost the
    # same, it multiplies along the one that is contiguous.
    along_i, along_j = work(j, i), work(i, j)
    if along_j > along_i or (along_j == along_i and v.stride(1) == 1):
        a, b, v, a_weight, b_weight = b, a, v.mT, b_weight, a_weight
    (c, c_task), (a_, a_task) = a, b
    y = v.new_empty(rows.total, n, dtype=dtype)
    depth = deep(v.shape[2], cap)
    u = v[:, 0] if b_weight is None else b_weight
    s = v[..., 0] if a_weight is None else a_weight
    extra = v if bias is None else bias

    def cut(config: Config) -> tuple[int, int]:
        return min(tile(rows.total), config.rows), min(tile(n), config.columns)

    def programs(config: Config) -> int:
        block, columns = cut(config)
        return up(rows.total, block) * up(n, columns)

    def run(config: Config) -> None:
        block, columns = cut(config)
        launch.start(
            _contract, programs(config),
            a_, c, v, u, s, extra, rows.keys, then.pre, y, rows.total, rows.per_task,
            *v.shape[1:], n,
            *a_.stride(), *c.stride(), *v.stride(), *u.stride(), *s.stride(), extra.stride(0),
            A_TASK=a_task, C_TASK=c_task, RAGGED=rows.ragged,
            HAS_U=b_weight is not None, HAS_S=a_weight is not None, HAS_BIAS=bias is not None,
            **then.options(), **launch.arithmetic(v.dtype), BM=block, BN=columns, BK=depth,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    launch.run(
        table, programs, run, ("contract", v.dtype, v.shape, power(rows.total), dtype), v.device
    )
    return y


def sum_outer(a: Operand, b: Operand, c: Operand, y: Tensor, rows: Rows) -> None:
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
    kind = gpu.arithmetic(y.dtype)
    total_dtype = torch.promote_types(y.dtype, torch.float32)

    def cut(config: Config) -> tuple[int, int, int]:
        inner = min(power(shape[1]), config.rows)
        outer = min(config.rows // inner, max(power(shape[0]), 16 // inner))
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
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if parts > 1:
            y.copy_(out.sum(0))

    launch.run(OUTER[kind], programs, run, ("outer", y.dtype, shape, power(rows.total)), y.device)
