// The weights of a block of networks at a time, and then each for its rows: where many rows share a
// task.
#pragma once

#include "isa/layer/generated_grad.h"
#include "isa/network/block.h"
#include "isa/network/differentiate.h"
#include "plan.h"

namespace hyperfast::HF_ISA {

// How the networks of a call are made: one for all pieces of a task, unless these are ragged or so
// many that their gradients, until they are added up, would take too much memory; then one for each
// piece.
struct Networks {
  Index each, count;  // pieces of a network, networks

  explicit Networks(const Groups& g)
      : each(!g.ragged && g.per_task <= 64 ? g.per_task : 1), count(g.pieces / each) {}

  // Networks at a time: whole strips of them where as many fit (36 pieces of the largest do), and
  // about as many each time.
  template <class C>
  Index together(Index params) const {
    constexpr Index strip = networks_strip<C>;
    Index most = max(networks_elements<C> / params / each, 1);
    if (most > strip) most = most / strip * strip;
    const Index times = ceil_div(count, most);
    return times > 1 ? min(round_up(ceil_div(count, times), strip), most) : max(count, 1);
  }
};

template <class T>
static void hyper_mlp_by_network(const HyperMlp& p) {
  using C = Acc<T>;
  const Index params = p.net.params;
  const Networks all(p.groups);
  const Index block = all.together<C>(params);
  const Index rows_each = ceil_div(total_rows(p.groups), max(p.groups.pieces, 1));
  const RowsOfNetworks rows{p.net, p.groups, p.x, p.y, p.preactivations};
  const C* panels = pack_head<T>(p, 0, ceil_div(all.count, block));
  C* w = scratch<C>(Slot::networks, max(block * params, 1));
  for (Index u0 = 0; u0 < all.count; u0 += block) {
    const NetworkBlock<T> networks =
        network_block<T>(p, u0, min(block, all.count - u0), all.each, panels);
    each_network<T>(networks, 0, w, rows_each, [&](Index first, Index last) {
      const auto of = [&](Index i) { return piece(p.groups, u0 * all.each + i); };
      for (Index i = first; i < last; ++i) {
        const bool more = i + 1 < last, other = more && (i + 1) % all.each == 0;
        run_piece<T, C>(rows, of(i), {w + i / all.each * params, nullptr}, other ? params : 0,
                        more ? of(i + 1) : Piece{});
      }
    });
  }
}

template <class T>
static void hyper_mlp_backward_by_network(const HyperMlpBackward& b) {
  using C = Acc<T>;
  const HyperMlp& p = b.forward;
  const Index params = p.net.params, features = p.features;
  const Networks networks_of(p.groups);
  const Index each = networks_of.each, count = networks_of.count;
  const Index block = networks_of.together<C>(params);
  const Index rows_each = ceil_div(total_rows(p.groups), max(p.groups.pieces, 1));
  const bool of_weights = b.grad_h || b.grad_weight || b.grad_bias;
  C* g = of_weights ? scratch<C>(Slot::gradients, block * each * params) : nullptr;
  // Those of a task's networks are added up, unless it has one.
  const bool direct = std::is_same_v<C, T> && !p.groups.ragged && p.groups.per_task == each;
  C* grad_h = b.grad_h && !direct ? scratch<C>(Slot::hidden_b, max(block * features, 1)) : nullptr;
  C* task_h = scratch<C>(Slot::hidden_c, max(features, 1));  // the sum over those of one task
  Index task = -1;
  // Sums over the blocks, in the accumulation type.
  C *sum_weight = nullptr, *sum_bias = nullptr;
  if constexpr (std::is_same_v<C, T>) {
    sum_weight = static_cast<C*>(b.grad_weight);
    sum_bias = static_cast<C*>(b.grad_bias);
  } else {
    C* sums = scratch<C>(Slot::sums, params * (features + 1));
    if (b.grad_weight) sum_weight = sums;
    if (b.grad_bias) sum_bias = sums + params * features;
  }
  // Without a gradient of x the first layer's weights are not needed, unless it is computed again,
  // or their gradient is that of what they were transformed from.
  const bool recompute = !p.preactivations && p.net.kept > 0;
  const bool all = b.grad_x || recompute || p.net.transforms;
  const Index used = all ? 0 : p.net.layers[0].params();
  const Index made = params - used;
  C* w = scratch<C>(
      Slot::networks,
      used + block * made);  // from w + used on: w is where the first network would start
  T* to_h = static_cast<T*>(b.grad_h);
  if (to_h && !direct)
    for (Index j = 0; j < p.groups.tasks * features; ++j) to_h[j] = narrow<T>(0);

  const C* panels = pack_head<T>(p, used, ceil_div(count, block));
  const GradientsOfRows rows{p.net, p.groups, p.x, p.preactivations, b.grad, b.grad_x};
  Index u0 = 0;
  do {  // once even without networks: the gradients are then zero
    const Index n = min(block, count - u0);
    const NetworkBlock<T> networks = network_block<T>(p, u0, n, each, panels);
    if (to_h && direct) grad_h = reinterpret_cast<C*>(to_h) + u0 * features;
    const bool small = small_networks(networks);
    each_network<T>(networks, used, w + used, 2 * rows_each, [&](Index first, Index last) {
      for (Index i = first; i < last; ++i)
        differentiate_piece<T, C>(rows, piece(p.groups, u0 * each + i), w + i / each * made,
                                  g ? g + i * params : nullptr);
      if (grad_h && small)
        differentiate_features<T>(networks.part(first, last), g + first * params,
                                  grad_h + first * features);
    });
    if (g) {
      add_up_pieces<T>(networks, g);
      differentiate_head<T>(networks, g, small ? nullptr : grad_h, sum_weight, sum_bias, u0 > 0);
    }
    for (Index u = 0; to_h && !direct && u < n; ++u) {  // those of a task are next to each other
      const bool first = piece(p.groups, (u0 + u) * each).task != task;
      task = piece(p.groups, (u0 + u) * each).task;
      for (Index k = 0; k < features; ++k) {
        task_h[k] = first ? grad_h[u * features + k] : task_h[k] + grad_h[u * features + k];
        to_h[task * features + k] = narrow<T>(task_h[k]);
      }
    }
    u0 += block;
  } while (u0 < count);

  if constexpr (!std::is_same_v<C, T>) {
    if (sum_weight)
      for (Index j = 0; j < params * features; ++j)
        static_cast<T*>(b.grad_weight)[j] = narrow<T>(sum_weight[j]);
    if (sum_bias)
      for (Index j = 0; j < params; ++j) static_cast<T*>(b.grad_bias)[j] = narrow<T>(sum_bias[j]);
  }
}

}  // namespace hyperfast::HF_ISA
