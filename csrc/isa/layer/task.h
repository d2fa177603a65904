// Given weights: y[r] = W_b x[r] + bias_b, and the gradient of W.
#pragma once

#include "isa/product/dot.h"
#include "isa/rows/pieces.h"

namespace hyperfast::HF_ISA {

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
      const T* bias =
          p.bias.data ? static_cast<const T*>(p.bias.data) + q.task * p.bias.task : nullptr;

      if (p.weight.in_stride == 1 && m <= few_rows) {
        const Index ahead = i + 1 < last ? weight_of(piece(p.groups, i + 1).task) - weight : 0;
        View<const C> x = gather<T>(p.x, p.groups, q, p.in, Slot::local_a);
        if (x.col != 1 || (x.row != p.in && m > 1)) x = compact(x, m, p.in, Slot::local_a);
        C* y = scratch<C>(Slot::block, max(m * p.out, 1));
        dots<C, T>(p.out, m, p.in, {weight, p.weight.out_stride, 1}, x.data, p.in, {},
                   {y, 1, p.out}, ahead);
        scatter<T>(p.y, p.groups, q, p.out, y, bias, p.bias.col);
        continue;
      }

      const View<const T> transposed = {weight, p.weight.in_stride,
                                        p.weight.out_stride};  // (in, out)
      const View<const C> x = gather<T>(p.x, p.groups, q, p.in, Slot::local_a);
      C* y = scratch<C>(Slot::block, max(m * p.out, 1));
      multiply<C, T>(m, p.out, p.in, x, transposed, {}, {y, p.out, 1});
      scatter<T>(p.y, p.groups, q, p.out, y, bias, p.bias.col);
    }
  });
}

template <class T>
static void task_linear_grad_weight_typed(const TaskLinearGradWeight& p) {
  using C = Acc<T>;
  // Blocks of output rows are shared out too, so that one task with many rows keeps every thread
  // busy.
  constexpr Index block = 8 * tile_rows;
  const Index blocks = max(ceil_div(p.out, block), 1);
  const Index rows_each =
      p.groups.ragged ? ceil_div(p.groups.rows, max(p.groups.tasks, 1)) : p.groups.rows;
  const Index work = max(max(rows_each, 1) * min(p.out, block) * p.in, 1);
  parallel(p.groups.pieces * blocks, max(parallel_work / work, 1), [&](Index first, Index last) {
    for (Index i = first; i < last; ++i) {
      const Piece q = piece(p.groups, i / blocks);
      const Index o = i % blocks * block, height = min(block, p.out - o);
      T* out = static_cast<T*>(p.y) + (q.task * p.out + o) * p.in;
      const View<const C> grad =
          gather<T>(p.grad, p.groups, q, p.out, Slot::local_a).transposed().at(o, 0);
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
