// Networks whose parameters are given, one a task.
#pragma once

#include "isa/network/apply.h"

namespace hyperfast::HF_ISA {

template <class T, class W>
static void task_mlp_typed(const TaskMlp& p) {
  const Index params = p.net.params;
  const Index rows_each = ceil_div(total_rows(p.groups), max(p.groups.pieces, 1));
  const RowsOfNetworks rows{p.net, p.groups, p.x, p.y, nullptr};
  const auto weights = [&](Index task) {
    return static_cast<const W*>(p.weight) + task * p.weight_task;
  };
  // Of small networks several are on their way at once: one access to memory takes as long as a few
  // of them do. A network of two lines is asked for 16 networks ahead.
  constexpr Index under_way = 2 << 10, line = 64 / Index(sizeof(W));
  const Index distance = min(under_way / max(params * Index(sizeof(W)), 1), 16);
  parallel(p.groups.pieces, max(parallel_work / max(rows_each * params, 1), 1),
           [&](Index first, Index last) {
             for (Index i = first; i < last; ++i) {
               const Piece q = piece(p.groups, i);
               const W* w = weights(q.task);
               if (distance > 1 && i + distance < last) {
                 const W* later = weights(piece(p.groups, i + distance).task);
                 for (Index k = 0; k < params; k += line) prefetch(later + k);
               }
               const Piece next = i + 1 < last ? piece(p.groups, i + 1) : Piece{q.task, 0, 0};
               const float* scales_and_biases =
                   p.scales_and_biases ? static_cast<const float*>(p.scales_and_biases) +
                                             q.task * p.scales_and_biases_task
                                       : nullptr;
               run_piece<T, W>(rows, q, {w, scales_and_biases}, weights(next.task) - w, next);
             }
           });
}

static void task_mlp(const TaskMlp& p) {
  if (p.scales_and_biases) return task_mlp_typed<float, std::int8_t>(p);
  with_type(p.dtype, [&](auto t) { task_mlp_typed<decltype(t), decltype(t)>(p); });
}

}  // namespace hyperfast::HF_ISA
