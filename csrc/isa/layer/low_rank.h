// Matrices of low rank: y[r] = init[r] + B_b A_b x[r] + bias_b, and its gradients. What lies
// between A and B, of few columns, stays in the first-level cache.
#pragma once

#include "isa/product/dot.h"
#include "isa/product/sums.h"
#include "isa/rows/staged.h"

namespace hyperfast::HF_ISA {

template <class C>
static View<const C> matrix_of(const TaskMatrix& w, Index task) {
  return {static_cast<const C*>(w.data) + task * w.task, w.out_stride, w.in_stride};
}

// y (m, n) = x w^T, w (n, depth), of the rows of a piece.
template <class C>
static void narrow_rows(const Rows& rows, const Groups& g, const Piece& q, Index n, Index depth,
                        View<const C> w, C* y) {
  const Index m = q.end - q.begin;
  const DotShape shape = DotShape::of<C>(m, n);
  if (rows.col == 1 && w.col == 1 && shape.pays<C>(m, n, depth)) {
    const auto row = [&](Index i) -> const C* { return row_data<C>(rows, g, q, q.begin + i); };
    return dot_tiles<C>(shape, m, n, depth, row, w, false, {y, n, 1});
  }
  const View<const C> x = gather<C>(rows, g, q, depth, Slot::local_a);
  multiply<C, C>(m, n, depth, x, w.transposed(), {}, {y, n, 1});
}

// M rows y and what they start from, or null: in one struct, as in tile.h.
template <int M, class C>
struct WideRows {
  C* y[M];
  const C* init[M];
};

// y = init + low w, of M rows and of two vectors of columns, or fewer. The rows of w, `depth`, are
// two vectors apart.
template <int M, bool Whole, class C>
static void widen_tile(const WideRows<M, C>& rows, Index columns, Index depth, const C* low,
                       const C* w) {
  constexpr int n = width<C>;
  const auto count = [&](int v) { return Whole ? n : int(max(min(columns - v * n, n), 0)); };
  Vec<C> acc[M][2] = {};
  if (rows.init[0])
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) acc[i][v] = get(rows.init[i] + v * n, count(v));
  for (Index k = 0; k < depth; ++k, w += 2 * n) {
    const Vec<C> w0 = load(w), w1 = load(w + n);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      const C s = low[i * depth + k];
      acc[i][0] += s * w0;
      acc[i][1] += s * w1;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) put<C>(rows.y[i] + v * n, acc[i][v], count(v));
}

// The rows of a piece: y = init + low w + bias, w (depth, columns).
template <class C>
static void widen_rows(const Rows& y, const Rows& init, const TaskVector& bias, const Groups& g,
                       const Piece& q, Index columns, Index depth, const C* low, View<const C> w) {
  constexpr Index both = 2 * width<C>;
  // Some columns at a time (16 KiB of w), all of a few rows: two vectors of all rows instead took
  // up to 0.2 ms longer (512 rows of 512 columns).
  const Index block = max((16 << 10) / Index(sizeof(C)) / max(depth, 1) / both, 1) * both;
  C* const panels = scratch<C>(Slot::panel, (depth + 1) * min(block, round_up(columns, both)));
  for (Index begin = 0; begin < columns; begin += block) {
    const Index end = min(begin + block, columns);
    for (Index o = begin; o < end; o += both)
      pack<C, C>(depth, min(both, end - o), w.at(0, o), panels + (o - begin) * depth, both, both);
    const auto some = [&](auto rows, Index j) {
      constexpr int M = decltype(rows)::value;
      WideRows<M, C> at{};
      for (int i = 0; i < M; ++i) {
        at.y[i] = row_data<C>(y, g, q, j + i) + begin;
        if (init.data) at.init[i] = row_data<C>(init, g, q, j + i) + begin;
      }
      const C* const from = low + (j - q.begin) * depth;
      for (Index o = begin; o < end; o += both) {
        const C* const panel = panels + (o - begin) * depth;
        if (end - o >= both)
          widen_tile<M, true, C>(at, both, depth, from, panel);
        else
          widen_tile<M, false, C>(at, end - o, depth, from, panel);
        for (int i = 0; i < M; ++i) {
          at.y[i] += both;
          if (init.data) at.init[i] += both;
        }
      }
    };
    Index j = q.begin;
    for (; j + 4 <= q.end; j += 4) some(std::integral_constant<int, 4>{}, j);
    for (; j < q.end; ++j) some(std::integral_constant<int, 1>{}, j);
  }
  if (!bias.data) return;
  const C* const own = static_cast<const C*>(bias.data) + q.task * bias.task;
  for (Index j = q.begin; j < q.end; ++j) {
    C* const row = row_data<C>(y, g, q, j);
    for (Index k = 0; k < columns; ++k) row[k] += own[k * bias.col];
  }
}

// Pieces for which handing some to another thread pays.
static inline Index low_rank_grain(const LowRankCall& p) {
  const Index rows_each = ceil_div(total_rows(p.groups), max(p.groups.pieces, 1));
  return max(parallel_work / max(rows_each * p.rank * (p.out + p.in), 1), 1);
}

template <class C>
static void low_rank_typed(const LowRank& p) {
  parallel(p.groups.pieces, low_rank_grain(p), [&](Index first, Index last) {
    for (Index i = first; i < last; ++i) {
      const Piece q = piece(p.groups, i);
      C* const low = scratch<C>(Slot::local_b, max((q.end - q.begin) * p.rank, 1));
      narrow_rows<C>(p.x, p.groups, q, p.rank, p.in, matrix_of<C>(p.a, q.task), low);
      widen_rows<C>(p.y, p.init, p.bias, p.groups, q, p.out, p.rank, low,
                    matrix_of<C>(p.b, q.task).transposed());
    }
  });
}

// Of a piece: both factors' products with its rows, A x and B^T grad, of `rank` columns each.
template <class C>
struct LowRows {
  Index m;
  C *of_x, *of_grad;
};

// Gradients of the factors and of the bias of one task, from all its rows: columns first, ...,
// last - 1 of both x and grad, whichever there are.
template <class C>
static void low_rank_weights(const LowRankGrad& p, Index task, const LowRows<C>& low,
                             View<const C> x, View<const C> grad, Index first, Index last) {
  if (const Index n = min(last, p.in) - first; p.grad_a && n > 0)
    multiply<C, C>(p.rank, n, low.m, {low.of_grad, 1, p.rank}, x, {},
                   {static_cast<C*>(p.grad_a) + task * p.rank * p.in + first, p.in, 1});
  const Index n = min(last, p.out) - first;
  if (n <= 0) return;
  if (p.grad_b)
    multiply<C, C>(n, p.rank, low.m, grad.transposed(), {low.of_x, p.rank, 1}, {},
                   {static_cast<C*>(p.grad_b) + (task * p.out + first) * p.rank, p.rank, 1});
  if (!p.grad_bias) return;
  C* const sum = static_cast<C*>(p.grad_bias) + task * p.out + first;
  for (Index k = 0; k < n; ++k) sum[k] = 0;
  add_rows<C>(low.m, n, grad.data, grad.row, sum);
}

template <class C>
static void low_rank_grad_typed(const LowRankGrad& p) {
  const Index rows = total_rows(p.groups), wide = max(p.in, p.out);
  const bool of_weights = p.grad_a || p.grad_b || p.grad_bias;
  C* const of_x = scratch<C>(Slot::hidden_a, max(rows * p.rank, 1));
  C* const of_grad = scratch<C>(Slot::hidden_b, max(rows * p.rank, 1));
  const auto low_rows = [&](const Piece& q) {
    const Index at = (p.groups.ragged ? q.begin : q.task * p.groups.rows + q.begin) * p.rank;
    return LowRows<C>{q.end - q.begin, of_x + at, of_grad + at};
  };
  const auto task = [&](Index i) { return piece(p.groups, i).task; };
  const auto alone = [&](Index i) {
    return (i == 0 || task(i - 1) != task(i)) &&
           (i + 1 == p.groups.pieces || task(i + 1) != task(i));
  };
  parallel(p.groups.pieces, low_rank_grain(p), [&](Index first, Index last) {
    for (Index i = first; i < last; ++i) {
      const Piece q = piece(p.groups, i);
      const LowRows<C> low = low_rows(q);
      const View<const C> a = matrix_of<C>(p.a, q.task), b = matrix_of<C>(p.b, q.task);
      if (p.grad_b) narrow_rows<C>(p.x, p.groups, q, p.rank, p.in, a, low.of_x);
      narrow_rows<C>(p.grad, p.groups, q, p.rank, p.out, b.transposed(), low.of_grad);
      if (p.grad_x.data) widen_rows<C>(p.grad_x, {}, {}, p.groups, q, p.in, p.rank, low.of_grad, a);
      if (of_weights && alone(i))
        low_rank_weights<C>(p, q.task, low, gather<C>(p.x, p.groups, q, p.in, Slot::local_a),
                            gather<C>(p.grad, p.groups, q, p.out, Slot::local_b), 0, wide);
    }
  });
  // Tasks of many rows: threads share their columns.
  for (Index i = 0, n; of_weights && i < p.groups.pieces; i += n) {
    n = 1;
    if (alone(i)) continue;
    while (i + n < p.groups.pieces && task(i + n) == task(i)) ++n;
    const Piece all{task(i), piece(p.groups, i).begin, piece(p.groups, i + n - 1).end};
    const LowRows<C> low = low_rows(all);
    constexpr Index columns = 128;
    parallel(ceil_div(wide, columns), max(parallel_work / max(low.m * p.rank * columns, 1), 1),
             [&](Index begin, Index end) {
               const Index first = begin * columns, last = min(end * columns, wide);
               const auto take = [&](Rows rows, Index width, Slot slot) {
                 rows.data = static_cast<C*>(rows.data) + first * rows.col;
                 return gather<C>(rows, p.groups, all, max(min(last, width) - first, 0), slot);
               };
               low_rank_weights<C>(p, all.task, low, take(p.x, p.in, Slot::local_a),
                                   take(p.grad, p.out, Slot::local_b), first, last);
             });
  }
}

static void low_rank(const LowRank& p) {
  p.dtype == Dtype::f64 ? low_rank_typed<double>(p) : low_rank_typed<float>(p);
}

static void low_rank_grad(const LowRankGrad& p) {
  p.dtype == Dtype::f64 ? low_rank_grad_typed<double>(p) : low_rank_grad_typed<float>(p);
}

}  // namespace hyperfast::HF_ISA
