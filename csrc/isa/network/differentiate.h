// Back through one network: the gradients of its parameters and of its rows, whose hidden layers
// are computed again, or read where they were kept, and stay in the second-level cache.
#pragma once

#include "isa/network/apply.h"

namespace hyperfast::HF_ISA {

// What all networks of a call have in common. What is null is not wanted, or was not kept.
struct GradientsOfRows {
  const Net& net;
  const Groups& groups;
  Rows x;
  const void* preactivations;
  Rows grad;
  void* grad_x;  // contiguous
};

template <class T, class Mode, class W>
static void differentiate_part(const Mode& mode, const GradientsOfRows& p, const Piece& q,
                               Weights<W> weights, Acc<T>* g, bool add) {
  using C = Acc<T>;
  const Net& net = p.net;
  const Index most = mode.size(net.widest), kept = mode.size(net.kept);
  // Of the layers that are activated, value and slope, one behind another; and two gradients.
  C* const values = scratch<C>(Slot::block, 2 * kept + 3 * most);
  C* const slopes = values + kept;
  C* const spare = slopes + kept;
  const C* x = take_rows<T>(mode, weights, p.x, p.groups, q, net.layers[0].in, Slot::local_d,
                            spare + (weights.first_pairs ? 0 : 2 * most));
  const C* x0 = x;
  if constexpr (turns_pairs<T, Mode>)
    if (weights.first_pairs) x0 = mode.apart(x, net.layers[0].in, spare + 2 * most);
  const T* pre = static_cast<const T*>(p.preactivations);
  const W* const w = weights.data;
  Index at = 0;
  for (Index n = 0; n < net.count && net.layers[n].kept; ++n) {
    const Layer& l = net.layers[n];
    C* const a = values + at;
    if (pre) {
      const Rows from = dense_rows(const_cast<T*>(pre), p.groups, l.out);
      mode.copy(gather<T>(from, p.groups, q, l.out, Slot::local_a), l.out, a);
      pre += total_rows(p.groups) * l.out;
      mode.activate(l, a, slopes + at);
    } else {
      mode.apply_activated(l, weights.template take<C>(l), 0, x, a, slopes + at);
    }
    x = a;
    at += mode.size(l.out);
  }
  const Layer& last = net.layers[net.count - 1];
  C* const own = spare + net.count % 2 * most;
  const C* grad = take_rows<T>(mode, p.grad, p.groups, q, last.out, Slot::local_a, own);
  if (last.kept) {
    at -= mode.size(last.out);
    mode.times(last.out, grad, slopes + at, own);
    grad = own;
  }
  for (Index n = net.count - 1; n >= 0; --n) {
    const Layer& l = net.layers[n];
    C* const next = n > 0 || p.grad_x ? spare + n % 2 * most : nullptr;
    if (n > 0) at -= mode.size(l.in);
    mode.differentiate(l, w + l.begin, grad, n > 0 ? values + at : x0, g ? g + l.begin : nullptr,
                       next, n > 0 ? slopes + at : nullptr, add);
    if (n == 0 && next)
      give_rows<T>(mode, dense_rows(p.grad_x, p.groups, l.in), p.groups, q, l.in, next);
    grad = next;
  }
}

// The gradients of one piece: g (params) of its network's parameters w, or null, and of x.
template <class T, class W>
static void differentiate_piece(const GradientsOfRows& p, const Piece& q, const W* w, Acc<T>* g) {
  using C = Acc<T>;
  const Index m = q.end - q.begin;
  if (m == 0) {
    for (Index j = 0; g && j < p.net.params; ++j) g[j] = 0;
    return;
  }
  if (m <= few_rows && !p.net.transforms)
    return differentiate_part<T>(Few<W, C>{m}, p, q, Weights<W>{w, nullptr}, g, false);
  const bool pairs = m > few_rows && first_in_pairs<T, W>(p.net);
  Weights<C> plain = plain_weights<C>(p.net, Weights<W>{w, nullptr}, pairs && !p.grad_x);
  if (m <= few_rows) {
    differentiate_part<T>(Few<C, C>{m}, p, q, plain, g, false);
  } else {
    if constexpr (std::is_same_v<W, bf16>)
      if (pairs) plain.first_pairs = w;
    const Index chunk = chunk_rows<C>(p.net, 32 << 10);
    for (Index r = q.begin; r < q.end; r += chunk) {
      const Piece part{q.task, r, min(r + chunk, q.end)};
      Ahead ahead;
      differentiate_part<T>(Many<C>(part.end - part.begin, ahead), p, part, plain, g, r > q.begin);
    }
  }
  if (g) undo_transforms<C>(p.net, w, g);
}

}  // namespace hyperfast::HF_ISA
