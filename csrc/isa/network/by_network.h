// The weights of a block of networks at a time, and then each for its rows: where many rows share a
// task.
#pragma once

#include "isa/layer/generated_grad.h"
#include "isa/network/apply.h"
#include "isa/network/block.h"
#include "plan.h"

namespace hyperfast::HF_ISA {

// Weights (or their gradients) of a block of networks.
template <class C>
constexpr Index networks_elements = networks_bytes / Index(sizeof(C));

// Networks at a time, of so many: whole tiles of them (36 of the largest fit), and about as many
// each time.
template <class C>
static Index networks_together(Index params, Index pieces) {
  const Index most = networks_elements<C> / params / tile_rows * tile_rows;
  const Index times = ceil_div(pieces, most);
  return times > 1 ? round_up(ceil_div(pieces, times), tile_rows) : max(pieces, 1);
}

template <class T>
static void hyper_mlp_by_network(const HyperMlp& p) {
  using C = Acc<T>;
  const Index params = p.net.params, pieces = p.groups.pieces;
  const Index block = networks_together<C>(params, pieces);
  const Index rows_each = ceil_div(total_rows(p.groups), max(pieces, 1));
  C* w = scratch<C>(Slot::networks, max(block * params, 1));
  for (Index u0 = 0; u0 < pieces; u0 += block) {
    const Index n = min(block, pieces - u0);
    generate_networks<T>(network_block<T>(p, u0, n, params), 0, w);
    parallel(n, max(parallel_work / max(rows_each * params, 1), 1), [&](Index first, Index last) {
      for (Index u = first; u < last; ++u)
        run_piece<T, C>(p.net, p.groups, piece(p.groups, u0 + u), p.x, p.y, p.preactivations,
                        {w + u * params, nullptr, nullptr, 0});
    });
  }
}

// The gradients of one piece: g (params) of its network's parameters, and of x. Pre-activations
// that were not kept are computed again: to write and read them would take longer.
template <class T>
static void differentiate_piece(const HyperMlpBackward& b, const Piece& q, const Acc<T>* w,
                                Acc<T>* g) {
  using C = Acc<T>;
  static const C one = 1;
  const HyperMlp& p = b.forward;
  const Net& net = p.net;
  const Index params = net.params, rows = total_rows(p.groups), outputs = net.outputs;
  const Index chunk = chunk_rows<C>(net), most = chunk * net.widest;
  const bool recompute = !p.preactivations && net.kept > 0;
  C* spare = scratch<C>(Slot::block, 3 * most + (recompute ? chunk * outputs : 0));
  C* inputs = spare + 2 * most;
  Network<C, C> network{w, nullptr, nullptr, 0};
  if (recompute) network.transposed = transpose_network<C, C>(net, w, net.bias, q.end - q.begin);
  for (Index j = 0; j < params; ++j) g[j] = 0;
  for (Index r = q.begin; r < q.end; r += chunk) {
    const Piece part{q.task, r, min(r + chunk, q.end)};
    const Index m = part.end - part.begin;
    View<const C> x0 = gather<T>(p.x, p.groups, part, net.layers[0].in, Slot::local_d);
    if (x0.col != 1) x0 = compact(x0, m, net.layers[0].in, Slot::local_d);
    const T* kept =
        static_cast<const T*>(p.preactivations) + (p.preactivations ? rows * net.kept : 0);
    C* computed = inputs + most;
    if (recompute)
      run_layers<C, C>(net, network, m, x0, spare, most, inputs, [&](Index l, const C* from) {
        const Index n = m * net.layers[l].out;
        for (Index j = 0; j < n; ++j) computed[j] = from[j];
        computed += n;
        return l + 1 < net.count && net.layers[l + 1].kept;
      });
    // g *= f'(pre), a = f(pre) for the rows of a layer, which are (m, out), one behind another.
    const auto back_through = [&](const Layer& layer, C* to, C* a) {
      if (recompute) {
        computed -= m * layer.out;
        return slope<C>(layer, m * layer.out, computed, to, a);
      }
      kept -= rows * layer.out;
      const Rows from = dense_rows(const_cast<T*>(kept), p.groups, layer.out);
      const View<const C> pre = gather<T>(from, p.groups, part, layer.out, Slot::local_c);
      slope<C>(layer, m * layer.out, pre.data, to, a);
    };
    View<const C> grad =
        gather<T>(b.grad, p.groups, part, net.layers[net.count - 1].out, Slot::local_a);
    if (net.layers[net.count - 1].kept) {
      const Index out = net.layers[net.count - 1].out;
      C* own = spare + net.count % 2 * most;
      for (Index j = 0; j < m; ++j)
        for (Index o = 0; o < out; ++o) own[j * out + o] = grad.data[j * grad.row + o * grad.col];
      back_through(net.layers[net.count - 1], own, nullptr);
      grad = {own, out, 1};
    }
    for (Index l = net.count - 1; l >= 0; --l) {
      const Layer& layer = net.layers[l];
      const Index matrix = layer.out * layer.in;
      C* next = spare + l % 2 * most;
      const bool wanted = l > 0 || b.grad_x;
      if (wanted)
        multiply<C, C>(m, layer.in, layer.out, grad, View<const C>{w + layer.begin, layer.in, 1},
                       {}, {next, layer.in, 1});
      View<const C> x;
      if (l > 0) {
        back_through(net.layers[l - 1], next, inputs);
        x = {inputs, layer.in, 1};
      } else {
        if (wanted)
          scatter<T>(dense_rows(b.grad_x, p.groups, layer.in), p.groups, part, layer.in, next,
                     nullptr, 0);
        x = x0;
      }
      C* to = g + layer.begin;
      if (layer.in < layer.out) {  // lanes along the longer side
        const View<C> transposed{to, 1, layer.in};
        multiply<C, C>(layer.in, layer.out, m, x.transposed(), grad, {to, 1, layer.in}, transposed);
      } else {
        multiply<C, C>(layer.out, layer.in, m, grad.transposed(), x, {to, layer.in, 1},
                       {to, layer.in, 1});
      }
      if (net.bias)
        multiply<C, C>(1, layer.out, m, {&one, 0, 0}, grad, {to + matrix, layer.out, 1},
                       {to + matrix, layer.out, 1});
      grad = {next, layer.in, 1};
    }
  }
}

template <class T>
static void hyper_mlp_backward_by_network(const HyperMlpBackward& b) {
  using C = Acc<T>;
  const HyperMlp& p = b.forward;
  const Index params = p.net.params, pieces = p.groups.pieces, features = p.features;
  const Index block = networks_together<C>(params, pieces);
  const Index rows_each = ceil_div(total_rows(p.groups), max(pieces, 1));
  C* g = scratch<C>(Slot::gradients, block * params);
  C* grad_h = b.grad_h ? scratch<C>(Slot::hidden_b, max(block * features, 1)) : nullptr;
  C* task_h = scratch<C>(Slot::hidden_c, max(features, 1));  // the sum over the pieces of one task
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
  // Without a gradient of x the first layer's weights are not needed, unless it is computed again.
  const Layer& inputs = p.net.layers[0];
  const bool recompute = !p.preactivations && p.net.kept > 0;
  const Index used = b.grad_x || recompute ? 0 : inputs.out * (inputs.in + p.net.bias);
  const Index made = params - used;
  C* w = scratch<C>(
      Slot::networks,
      used + block * made);  // from w + used on: w is where the first network would start
  T* to_h = static_cast<T*>(b.grad_h);
  if (to_h)
    for (Index j = 0; j < p.groups.tasks * features; ++j) to_h[j] = narrow<T>(0);

  Index u0 = 0;
  do {  // once even without pieces: the gradients are then zero
    Index n = min(block, pieces - u0);
    const NetworkBlock<T> networks = network_block<T>(p, u0, n, params);
    generate_networks<T>(networks, used, w + used);
    parallel(n, max(parallel_work / max(2 * rows_each * params, 1), 1),
             [&](Index first, Index last) {
               for (Index u = first; u < last; ++u)
                 differentiate_piece<T>(b, piece(p.groups, u0 + u), w + u * made, g + u * params);
             });
    differentiate_head<T>(networks, g, grad_h, sum_weight, sum_bias, u0 > 0);
    for (Index u = 0; to_h && u < n; ++u) {  // pieces of a task are next to each other
      const bool first = piece(p.groups, u0 + u).task != task;
      task = piece(p.groups, u0 + u).task;
      for (Index k = 0; k < features; ++k) {
        task_h[k] = first ? grad_h[u * features + k] : task_h[k] + grad_h[u * features + k];
        to_h[task * features + k] = narrow<T>(task_h[k]);
      }
    }
    u0 += block;
  } while (u0 < pieces);

  if constexpr (!std::is_same_v<C, T>) {
    if (sum_weight)
      for (Index j = 0; j < params * features; ++j)
        static_cast<T*>(b.grad_weight)[j] = narrow<T>(sum_weight[j]);
    if (sum_bias)
      for (Index j = 0; j < params; ++j) static_cast<T*>(b.grad_bias)[j] = narrow<T>(sum_bias[j]);
  }
}

}  // namespace hyperfast::HF_ISA
