// Gradients of networks whose parameters are given.
#pragma once

#include "isa/network/differentiate.h"

namespace hyperfast::HF_ISA {

template <class T>
static void task_mlp_backward_typed(const TaskMlpBackward& b) {
  using C = Acc<T>;
  const Index params = b.net.params, pieces = b.groups.pieces;
  const GradientsOfRows rows{b.net, b.groups, b.x, b.preactivations, b.grad, b.grad_x};
  const auto task = [&](Index i) { return piece(b.groups, i).task; };
  // The gradients of pieces that share a task lie one behind another until they are added up.
  const bool cut = b.grad_weight && (b.groups.ragged || b.groups.per_task > 1);
  Index* const part = cut ? scratch<Index>(Slot::features, max(pieces, 1)) : nullptr;
  Index parts = 0;
  for (Index i = 0; cut && i < pieces; ++i) {
    const bool alone =
        (i == 0 || task(i - 1) != task(i)) && (i + 1 == pieces || task(i + 1) != task(i));
    part[i] = alone ? -1 : parts++;
  }
  C* const sums = scratch<C>(Slot::gradients, max(parts * params, 1));
  const auto of_task = [&](Index t) { return static_cast<T*>(b.grad_weight) + t * params; };

  const Index rows_each = ceil_div(total_rows(b.groups), max(pieces, 1));
  parallel(pieces, max(parallel_work / ((3 * rows_each + 1) * params), 1),
           [&](Index first, Index last) {
             for (Index i = first; i < last; ++i) {
               const Piece q = piece(b.groups, i);
               const T* w = static_cast<const T*>(b.weight) + q.task * b.weight_task;
               if (!b.grad_weight) {
                 differentiate_piece<T, T>(rows, q, w, nullptr);
               } else if (cut && part[i] >= 0) {
                 differentiate_piece<T, T>(rows, q, w, sums + part[i] * params);
               } else if constexpr (std::is_same_v<T, C>) {
                 differentiate_piece<T, T>(rows, q, w, of_task(q.task));
               } else {
                 C* const g = scratch<C>(Slot::local_b, params);
                 differentiate_piece<T, T>(rows, q, w, g);
                 for (Index j = 0; j < params; ++j) of_task(q.task)[j] = narrow<T>(g[j]);
               }
             }
           });

  for (Index i = 0, n; i < pieces && parts; i += n) {
    n = 1;
    if (part[i] < 0) continue;
    while (i + n < pieces && task(i + n) == task(i)) ++n;
    const C* const from = sums + part[i] * params;
    T* const to = of_task(task(i));
    parallel(params, max(parallel_work / n, 1), [&](Index first, Index last) {
      for (Index j = first; j < last; ++j) {
        C s = from[j];
        for (Index k = 1; k < n; ++k) s += from[k * params + j];
        to[j] = narrow<T>(s);
      }
    });
  }
}

static void task_mlp_backward(const TaskMlpBackward& b) {
  with_type(b.dtype, [&](auto t) { task_mlp_backward_typed<decltype(t)>(b); });
}

}  // namespace hyperfast::HF_ISA
