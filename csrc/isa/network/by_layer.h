// A network layer by layer, each for all tasks: where few rows share a task.
#pragma once

#include "isa/layer/generated_grad.h"
#include "isa/network/by_lanes.h"
#include "isa/network/layer_of.h"

namespace hyperfast::HF_ISA {

// Threads share n elements in whole vectors of any type: what is computed one by one does not
// depend on them.
template <class F>
static void each_stretch(Index n, const F& body) {
  constexpr Index some = 64;
  parallel(ceil_div(n, some), parallel_work / 8 / some,
           [&](Index begin, Index end) { body(begin * some, min(end * some, n) - begin * some); });
}

template <class T>
static void hyper_mlp_by_layers(const HyperMlp& p) {
  using C = Acc<T>;
  if (runs_by_lanes(p)) return hyper_mlp_by_lanes<T>(p);
  const Index rows = total_rows(p.groups), most = p.net.widest;
  const auto hidden = [&](C* data, Index columns) {
    return Staged<C>{data, p.groups.ragged ? 0 : p.groups.rows * columns, columns, 1};
  };
  // Hidden rows stay as they are staged: those of a task side by side, in the accumulation type.
  Staged<const C> x = stage<T>(p.x, p.groups, p.net.layers[0].in, Slot::rows_a);
  T* kept = static_cast<T*>(p.preactivations);
  for (Index l = 0; l < p.net.count; ++l) {
    const Layer& layer = p.net.layers[l];
    const bool last = l + 1 == p.net.count, keep = kept && layer.kept;
    const Rows pre_rows = dense_rows(kept, p.groups, layer.out);
    const Staged<C> a =
        last ? place<T>(p.y, p.groups, layer.out, Slot::rows_out)
             : hidden(scratch<C>(l % 2 ? Slot::hidden_a : Slot::hidden_b, max(rows * most, 1)),
                      layer.out);
    const Staged<C> pre =
        keep && in_place<T>(p.groups) ? place<T>(pre_rows, p.groups, layer.out, Slot::rows_out) : a;
    hyper_linear_staged<T>(layer_of<T>(p, layer, plan_of(p, layer)), x, pre);
    if (keep) {
      unstage<T>(pre, pre_rows, p.groups, layer.out);
      kept += rows * layer.out;
    }
    each_stretch(rows * layer.out,
                 [&](Index at, Index n) { activate<C>(layer, n, pre.data + at, a.data + at); });
    if (last) unstage<T>(a, p.y, p.groups, layer.out);
    x = {a.data, a.task, a.row, a.col};
  }
}

template <class T>
static void hyper_mlp_backward_by_layers(const HyperMlpBackward& b) {
  using C = Acc<T>;
  HyperMlp p = b.forward;
  const Index rows = total_rows(p.groups), most = p.net.widest, sums = p.groups.tasks * p.features;
  const Index kept = rows * p.net.kept;
  if (!p.preactivations && kept > 0) {  // computed again
    p.preactivations = scratch<T>(Slot::recomputed, kept);
    const Index out = p.net.layers[p.net.count - 1].out;
    p.y = dense_rows(scratch<T>(Slot::hidden_c, max(rows * most, 1)), p.groups, out);
    hyper_mlp_by_layers<T>(p);
  }
  const T* pre = static_cast<const T*>(p.preactivations) + kept;  // read backwards
  T* grad = static_cast<T*>(b.grad.data);
  const auto back_through = [&](const Layer& layer, T* g, T* a) {
    pre -= rows * layer.out;
    each_stretch(rows * layer.out, [&](Index at, Index n) {
      slope<T>(layer, n, pre + at, g + at, a ? a + at : nullptr);
    });
  };
  if (p.net.layers[p.net.count - 1].kept)
    back_through(p.net.layers[p.net.count - 1], grad, nullptr);

  // In the accumulation type, lest the sum over the layers be rounded after each.
  C* total = accumulator<T>(b.grad_h, sums);
  T* inputs = scratch<T>(Slot::hidden_c, max(rows * most, 1));
  for (Index l = p.net.count - 1; l >= 0; --l) {
    const Layer& layer = p.net.layers[l];
    const Plan plan = default_plan(Makes::weights, p.dtype, p.groups, layer.out * layer.in,
                                   p.features, has_matrix_unit, has_pair_dot);
    const Plan grad_plan = default_plan(Makes::gradients, p.dtype, p.groups, layer.params(),
                                        p.features, has_matrix_unit, has_pair_dot);
    const HeadMatrix matrix = matrix_of<T>(p.head, layer);
    const HeadMatrix vector = vector_of<T>(p.head, layer);
    const Rows g = dense_rows(grad, p.groups, layer.out);
    T* next = l == 0 ? static_cast<T*>(b.grad_x)
                     : scratch<T>(l % 2 ? Slot::hidden_a : Slot::hidden_b, max(rows * most, 1));
    if (next) {
      hyper_linear_typed<T>({p.dtype,
                             plan,
                             p.groups,
                             layer.in,
                             layer.out,
                             p.features,
                             g,
                             p.h,
                             matrix.transposed(),
                             {},
                             dense_rows(next, p.groups, layer.in),
                             layer.transform});
    }
    if (l > 0) back_through(p.net.layers[l - 1], next, inputs);
    const Rows x = l > 0 ? dense_rows(inputs, p.groups, layer.in) : p.x;
    const auto of_layer = [&](void* all, Index each) {
      return all ? static_cast<T*>(all) + layer.begin * each : nullptr;
    };
    hyper_linear_grad_typed<T>(
        {p.dtype, grad_plan, p.groups, layer.out, layer.in, p.features, layer.own_bias(), g, x, p.h,
         matrix, vector, nullptr, of_layer(b.grad_weight, p.features), of_layer(b.grad_bias, 1),
         layer.transform},
        total, l + 1 < p.net.count);
    grad = next;
  }
  round_off<T>(total, sums, b.grad_h);
}

}  // namespace hyperfast::HF_ISA
