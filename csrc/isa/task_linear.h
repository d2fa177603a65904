// Given weights: y[r] = W_b x[r] + bias_b, and the gradient of W.
#pragma once

#include "rows.h"

namespace hyperfast::HF_ISA {

// Up to so many rows of a task, turning its weight into panels costs more than it saves.
constexpr Index few_rows = 6;

// A weight whose rows are contiguous, and few rows of x: one pass over W, in whatever type it is stored.
// `ahead` is the distance to the weight of the next task, fetched into the cache meanwhile.
template <int N, class T>
static void dot_rows(Index out, Index in, const T* weight, Index out_stride, Index ahead,
                     const Acc<T>* x, Acc<T>* y, Index y_row) {
  using C = Acc<T>;
  constexpr int w = width<C>;
  constexpr Index line = 64 / sizeof(T);
  const Index whole = in / w * w;
  for (Index o = 0; o < out; ++o) {
    const T* row = weight + o * out_stride;
    Vec<C> acc[N] = {};
    for (Index i = 0; i < whole; i += w) {
      if (ahead && i % line == 0) __builtin_prefetch(row + ahead + i);
      const Vec<C> v = load_wide(row + i);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[n] += v * load(x + n * in + i);
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      C s = sum<C>(acc[n]);
      for (Index i = whole; i < in; ++i) s += widen(row[i]) * x[n * in + i];
      y[n * y_row + o] = s;
    }
  }
}

template <class T>
static void task_linear_typed(const TaskLinear& p) {
  using C = Acc<T>;
  const Index rows_each = p.groups.list ? ceil_div(p.groups.rows, max(p.groups.pieces, 1))
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
        View<const C> x = gather<T>(p.x, p.groups, q, p.in, Slot::b);
        if (x.col != 1 || (x.row != p.in && m > 1)) x = compact(x, m, p.in, Slot::b);
        C* y = scratch<C>(Slot::c, max(m * p.out, 1));
        for (Index j = 0; j < m; j += 2)
          (m - j > 1 ? dot_rows<2, T> : dot_rows<1, T>)(p.out, p.in, weight, p.weight.out,
                                                       j ? 0 : ahead, x.data + j * p.in,
                                                       y + j * p.out, p.out);
        scatter<T>(p.y, p.groups, q, p.out, y, bias, p.bias.col);
        continue;
      }

      const View<const T> turned = {weight, p.weight.in, p.weight.out};  // (in, out)
      const View<const C> x = gather<T>(p.x, p.groups, q, p.in, Slot::b);
      C* y = scratch<C>(Slot::c, max(m * p.out, 1));
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
  const Index rows_each = p.groups.list ? ceil_div(p.groups.rows, max(p.groups.tasks, 1)) : p.groups.rows;
  const Index work = max(max(rows_each, 1) * min(p.out, block) * p.in, 1);
  parallel(p.groups.pieces * blocks, max(parallel_work / work, 1), [&](Index first, Index last) {
    for (Index i = first; i < last; ++i) {
      const Piece q = piece(p.groups, i / blocks);
      const Index o = i % blocks * block, height = min(block, p.out - o);
      T* out = static_cast<T*>(p.y) + (q.task * p.out + o) * p.in;
      const View<const C> grad = gather<T>(p.grad, p.groups, q, p.out, Slot::b).transposed().at(o, 0);
      const View<const C> x = gather<T>(p.x, p.groups, q, p.in, Slot::c);
      if constexpr (std::is_same_v<C, T>) {
        multiply<C, C>(height, p.in, q.end - q.begin, grad, x, {}, {out, p.in, 1});
      } else {
        C* sum = scratch<C>(Slot::d, max(height * p.in, 1));
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
