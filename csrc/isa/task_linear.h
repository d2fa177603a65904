// Given weights: y[r] = W_b x[r] + bias_b, and the gradient of W.
#pragma once

#include "rows.h"

namespace hyperfast::HF_ISA {

// Up to so many rows of a task, turning its weight into panels costs more than it saves.
constexpr Index few_rows = 6;

// y[r][n] = init[r][n] + <a[r], b[n]> for N rows b of C, `b_row` apart. Rows of a are contiguous, in
// whatever type they are stored; one pass over them. `ahead` is the distance to what will be read next
// (0: unknown), fetched into the cache meanwhile.
template <int N, class C, class T>
static void dot_rows(Index rows, Index depth, const T* a, Index a_row, Index ahead, const C* b,
                     Index b_row, View<const C> init, View<C> y) {
  constexpr int w = width<C>;
  constexpr Index line = 64 / sizeof(T);
  const Index whole = depth / w * w;
  for (Index r = 0; r < rows; ++r, a += a_row) {
    Vec<C> acc[N] = {};
    for (Index i = 0; i < whole; i += w) {
      if (ahead && i % line == 0) prefetch(a + ahead + i);
      const Vec<C> v = load_wide(a + i);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[n] += v * load(b + n * b_row + i);
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      C s = sum<C>(acc[n]);
      for (Index i = whole; i < depth; ++i) s += widen(a[i]) * b[n * b_row + i];
      y.data[r * y.row + n * y.col] = init.data ? init.data[r * init.row + n * init.col] + s : s;
    }
  }
}

// The same for any number n of rows of b; a.col == 1.
template <class C, class T>
static void dots(Index rows, Index n, Index depth, View<const T> a, const C* b, Index b_row,
                 View<const C> init, View<C> y, Index ahead = 0) {
  for (Index j = 0; j < n; j += 2, ahead = 0)
    (n - j > 1 ? dot_rows<2, C, T> : dot_rows<1, C, T>)(rows, depth, a.data, a.row, ahead,
                                                       b + j * b_row, b_row,
                                                       init.data ? init.at(0, j) : init, y.at(0, j));
}

template <class T>
static void task_linear_typed(const TaskLinear& p) {
  using C = Acc<T>;
  const Index rows_each = p.groups.ragged ? ceil_div(p.groups.rows, max(p.groups.pieces, 1))
                                        : min(p.groups.rows, p.groups.cut);
  const Index work = max(rows_each * p.out * p.in, 1);
  const auto weight_of = [&](Index task) {
    return static_cast<const T*>(p.weight.data) + task * p.weight.task;
  };
  parallel(p.groups.pieces, max(parallel_work / work, 1), [&](Index first, Index last) {
    for (Index i = first; i < last; ++i) {
      const Piece q = piece(p.groups, i);
      const Index m = q.end - q.begin;
      const T* weight = weight_of(q.task);
      const T* bias = p.bias.data ? static_cast<const T*>(p.bias.data) + q.task * p.bias.task : nullptr;

      if (p.weight.in == 1 && m <= few_rows) {
        const Index ahead = i + 1 < last ? weight_of(piece(p.groups, i + 1).task) - weight : 0;
        View<const C> x = gather<T>(p.x, p.groups, q, p.in, Slot::local_a);
        if (x.col != 1 || (x.row != p.in && m > 1)) x = compact(x, m, p.in, Slot::local_a);
        C* y = scratch<C>(Slot::block, max(m * p.out, 1));
        dots<C, T>(p.out, m, p.in, {weight, p.weight.out, 1}, x.data, p.in, {}, {y, 1, p.out}, ahead);
        scatter<T>(p.y, p.groups, q, p.out, y, bias, p.bias.col);
        continue;
      }

      const View<const T> turned = {weight, p.weight.in, p.weight.out};  // (in, out)
      const View<const C> x = gather<T>(p.x, p.groups, q, p.in, Slot::local_a);
      C* y = scratch<C>(Slot::block, max(m * p.out, 1));
      multiply<C, T>(m, p.out, p.in, x, turned, {}, {y, p.out, 1});
      scatter<T>(p.y, p.groups, q, p.out, y, bias, p.bias.col);
    }
  });
}

template <class T>
static void task_linear_grad_weight_typed(const TaskLinearGradWeight& p) {
  using C = Acc<T>;
  // Blocks of output rows are shared out too, so that one task with many rows keeps every thread busy.
  constexpr Index block = 8 * tile_rows;
  const Index blocks = max(ceil_div(p.out, block), 1);
  const Index rows_each = p.groups.ragged ? ceil_div(p.groups.rows, max(p.groups.tasks, 1)) : p.groups.rows;
  const Index work = max(max(rows_each, 1) * min(p.out, block) * p.in, 1);
  parallel(p.groups.pieces * blocks, max(parallel_work / work, 1), [&](Index first, Index last) {
    for (Index i = first; i < last; ++i) {
      const Piece q = piece(p.groups, i / blocks);
      const Index o = i % blocks * block, height = min(block, p.out - o);
      T* out = static_cast<T*>(p.y) + (q.task * p.out + o) * p.in;
      const View<const C> grad = gather<T>(p.grad, p.groups, q, p.out, Slot::local_a).transposed().at(o, 0);
      const View<const C> x = gather<T>(p.x, p.groups, q, p.in, Slot::block);
      if constexpr (std::is_same_v<C, T>) {
        multiply<C, C>(height, p.in, q.end - q.begin, grad, x, {}, {out, p.in, 1});
      } else {
        C* sum = scratch<C>(Slot::local_b, max(height * p.in, 1));
        multiply<C, C>(height, p.in, q.end - q.begin, grad, x, {}, {sum, p.in, 1});
        for (Index j = 0; j < height * p.in; ++j) out[j] = narrow<T>(sum[j]);
      }
    }
  });
}

static void task_linear(const TaskLinear& p) {
  with_type(p.dtype, [&](auto t) { task_linear_typed<decltype(t)>(p); });
}

static void task_linear_grad_weight(const TaskLinearGradWeight& p) {
  with_type(p.dtype, [&](auto t) { task_linear_grad_weight_typed<decltype(t)>(p); });
}

}  // namespace hyperfast::HF_ISA
