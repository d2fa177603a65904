// A block of whole networks and what makes them: their parameters w (n, params) are h W^T and
// biases; from the gradients g of these come those of the head, g^T h, and those of its features, g
// W.
#pragma once

#include "isa/layer/head.h"
#include "isa/product/dot.h"

namespace hyperfast::HF_ISA {

// Networks of so many pieces; h (n, features) is what they are made from.
template <class T>
struct NetworkBlock {
  const HyperMlp& p;
  Index n, params;
  const Acc<T>* h;

  // The head's rows from parameter q on.
  View<const T> head(Index q) const {
    return {static_cast<const T*>(p.head.weight) + q * p.head.row, p.head.row, p.head.feature};
  }
  Acc<T> bias(Index q) const {
    return p.head.bias ? widen(static_cast<const T*>(p.head.bias)[q * p.head.bias_step]) : 0;
  }
};

// Of pieces u0, ..., u0 + n - 1.
template <class T>
static NetworkBlock<T> network_block(const HyperMlp& p, Index u0, Index n, Index params) {
  using C = Acc<T>;
  C* h = scratch<C>(Slot::features, max(n * p.features, 1));
  for (Index u = 0; u < n; ++u)
    copy_features<T>(p.h, piece(p.groups, u0 + u).task, p.features, false, h + u * p.features);
  return {p, n, params, h};
}

// The networks' parameters from number `from` on: w (n, params - from).
template <class T>
static void generate_networks(const NetworkBlock<T>& b, Index from, Acc<T>* w) {
  using C = Acc<T>;
  const Index run = 4 * lanes<C>, features = b.p.features;
  const Index runs = ceil_div(b.params - from, run);
  // Where the networks are small, threads share them too, in parts for which it pays to pack the
  // head once more (a tenth of the work).
  const Index most = runs < 16 ? 11 * tile_rows : max(b.n, 1), parts = ceil_div(b.n, most);
  parallel(parts * runs, max(parallel_work / max(min(most, b.n) * run * features, 1), 1),
           [&](Index begin, Index end) {
             for (Index item = begin; item < end; ++item) {
               const Index u = item / runs * most, n = min(most, b.n - u);
               const Index q = from + item % runs * run, count = min(run, b.params - q);
               const C* const h = b.h + u * features;
               C* bias = scratch<C>(Slot::local_c, run);
               for (Index j = 0; j < count; ++j) bias[j] = b.bias(q + j);
               const View<const C> init{bias, 0, 1};
               const View<C> to{w + u * (b.params - from) + q - from, b.params - from, 1};
               if (b.p.head.feature == 1 && b.n <= few_rows)
                 dots<C, T>(count, n, features, b.head(q), h, features, init.transposed(),
                            to.transposed());
               else
                 multiply<C, T>(n, count, features, {h, features, 1}, b.head(q).transposed(), init,
                                to);
             }
           });
}

// From g (n, params), the gradients of the networks: grad_h (n, features), and sums (params,
// features) and (params), to which `add` what was in them. Those that are null are not wanted.
template <class T>
static void differentiate_head(const NetworkBlock<T>& b, const Acc<T>* g, Acc<T>* grad_h,
                               Acc<T>* sum_weight, Acc<T>* sum_bias, bool add) {
  using C = Acc<T>;
  const Index n = b.n, params = b.params, features = b.p.features, size = n * features;
  // Threads share the parameters, a stretch at a time: its part of g is read once, from the
  // second-level cache, for both products. How many stretches there are, and hence how sums are
  // split, does not depend on the threads.
  const Index most =
      max(min((8 << 20) / Index(sizeof(C)) / max(size, 1), min(max(params / 512, 16), 64)), 2);
  const Index run = round_up(ceil_div(params, most), tile_rows), runs = ceil_div(params, run);
  // Of small networks a stretch would be short for the sums it costs: then threads share the
  // networks first.
  const bool small = n > tile_rows && params < 4096;
  C* parts = grad_h && !small ? scratch<C>(Slot::hidden_a, max(runs * size, 1)) : nullptr;
  if (grad_h && small)
    parallel(ceil_div(n, tile_rows),
             max(parallel_work / (tile_rows * params * max(features, 1)), 1),
             [&](Index first, Index last) {
               const Index u = first * tile_rows, m = min(last * tile_rows, n) - u;
               multiply<C, T>(m, features, params, {g + u * params, params, 1}, b.head(0), {},
                              {grad_h + u * features, features, 1});
             });
  parallel(runs, max(parallel_work / max(run * size, 1), 1), [&](Index first, Index last) {
    for (Index i = first; i < last; ++i) {
      const Index q = i * run, count = min(run, params - q);
      if (parts)
        multiply<C, T>(n, features, count, {g + q, params, 1}, b.head(q), {},
                       {parts + i * size, features, 1});
      if (sum_weight) {
        const View<C> to{sum_weight + q * features, features, 1};
        multiply<C, C>(count, features, n, View<const C>{g + q, 1, params},
                       View<const C>{b.h, features, 1},
                       add ? View<const C>{to.data, features, 1} : View<const C>{}, to);
      }
      if (!sum_bias) continue;
      if (!add)
        for (Index j = q; j < q + count; ++j) sum_bias[j] = 0;
      for (Index u = 0; u < n; ++u)
        for (Index j = q; j < q + count; ++j) sum_bias[j] += g[u * params + j];
    }
  });
  for (Index i = 0; parts && i < runs; ++i)
    for (Index j = 0; j < size; ++j) grad_h[j] = i ? grad_h[j] + parts[i * size + j] : parts[j];
}

}  // namespace hyperfast::HF_ISA
