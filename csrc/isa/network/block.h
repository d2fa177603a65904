// A block of whole networks and what makes them: their parameters w (n, params) are h W^T and
// biases; from the gradients g of these come those of the head, g^T h, and those of its features, g
// W.
#pragma once

#include "isa/layer/head.h"
#include "isa/product/dot.h"

namespace hyperfast::HF_ISA {

// So many networks, each for so many pieces of rows; h (n, features) is what they are made from.
template <class T>
struct NetworkBlock {
  const HyperMlp& p;
  Index n, each, params;
  const Acc<T>* h;
  bool few;  // the head is read as it lies

  NetworkBlock part(Index first, Index last) const {
    return {p, last - first, each, params, h + first * p.features, few};
  }

  // The head's rows from parameter q on.
  View<const T> head(Index q) const {
    return {static_cast<const T*>(p.head.weight) + q * p.head.row, p.head.row, p.head.feature};
  }
  Acc<T> bias(Index q) const {
    return p.head.bias ? widen(static_cast<const T*>(p.head.bias)[q * p.head.bias_step]) : 0;
  }
};

// Numbers u0, ..., u0 + n - 1, of `each` pieces each.
template <class T>
static NetworkBlock<T> network_block(const HyperMlp& p, Index u0, Index n, Index each) {
  using C = Acc<T>;
  C* h = scratch<C>(Slot::features, max(n * p.features, 1));
  for (Index u = 0; u < n; ++u)
    copy_features<T>(p.h, piece(p.groups, (u0 + u) * each).task, p.features, false,
                     h + u * p.features);
  return {p, n, each, p.net.params, h, n <= few_rows && p.head.feature == 1};
}

// Few networks: their lanes side by side, and the head's rows as they lie, never packed (16
// networks of 65,536 parameters, 256 features: 14 of 46 ms went into packing). h (features, row)
// and what is made (count, row) hold so many lanes.
template <class C>
static void generate_in_lanes(Index n, Index count, Index depth, View<const C> head, const C* h,
                              Index row, const C* bias, View<C> w) {
  C* made = scratch<C>(Slot::local_d, count * row);
  const Index step = depth_block * lanes<C> / row;
  View<const C> init{bias, 1, 0};
  Index k = 0;
  do {
    sweep<C, false>(count, int(row / width<C>), min(step, depth - k), head.at(0, k), h + k * row,
                    row, 0, init, {made, row, 1}, int(row));
    init = {made, row, 1};
    k += step;
  } while (k < depth);
  pack<C, C>(n, count, {made, 1, row}, w.data, w.row, count);
}

// The networks' parameters from number `from` on: w (n, params - from).
template <class T>
static void generate_networks(const NetworkBlock<T>& b, Index from, Acc<T>* w) {
  using C = Acc<T>;
  const Index run = 4 * lanes<C>, features = b.p.features, row = round_up(b.n, width<C>);
  const bool in_lanes = std::is_same_v<C, T> && b.n > few_rows && row <= lanes<C>;
  parallel(ceil_div(b.params - from, run), max(parallel_work / max(b.n * run * features, 1), 1),
           [&](Index begin, Index end) {
             const C* h = b.h;
             if (in_lanes) {
               C* panel = scratch<C>(Slot::panel, max(features, 1) * row);
               pack<C, C>(features, b.n, {b.h, 1, features}, panel, row, row);
               h = panel;
             }
             for (Index q = from + begin * run; q < min(from + end * run, b.params); q += run) {
               const Index count = min(run, b.params - q);
               C* bias = scratch<C>(Slot::local_c, run);
               for (Index j = 0; j < count; ++j) bias[j] = b.bias(q + j);
               const View<const C> init{bias, 0, 1};
               const View<C> to{w + q - from, b.params - from, 1};
               if constexpr (std::is_same_v<C, T>)
                 if (in_lanes) {
                   generate_in_lanes<C>(b.n, count, features, b.head(q), h, row, bias, to);
                   continue;
                 }
               if (b.few)
                 dots<C, T>(count, b.n, features, b.head(q), b.h, features, init.transposed(),
                            to.transposed());
               else
                 multiply<C, T>(b.n, count, features, {b.h, features, 1}, b.head(q).transposed(),
                                init, to);
             }
           });
}

// Whether threads share networks sooner than the parameters of each, of which there are few.
template <class T>
static bool small_networks(const NetworkBlock<T>& b) {
  return b.each == 1 && b.n > tile_rows && b.params < 4096;
}

// Makes the networks' parameters and calls body(first, last) for some of their pieces at a time,
// each of which has so many rows.
template <class T, class F>
static void each_network(const NetworkBlock<T>& b, Index from, Acc<T>* w, Index rows,
                         const F& body) {
  const Index work = max(rows * b.params, 1);
  // A thread makes small ones itself, of so many that to pack the head for them takes little: the
  // head of a network may have no more panels than there are threads, or 3 for two of them.
  const Index share = ceil_div(b.n, thread_count());
  if (!small_networks(b) || share < 4 * tile_rows) {
    generate_networks<T>(b, from, w);
    return parallel(b.n * b.each, max(parallel_work / work, 1), body);
  }
  const Index some = round_up(share, tile_rows);
  parallel(ceil_div(b.n, some), max(parallel_work / (some * (work + b.params * b.p.features)), 1),
           [&](Index begin, Index end) {
             const Index first = begin * some, last = min(end * some, b.n);
             generate_networks<T>(b.part(first, last), from, w + first * (b.params - from));
             body(first, last);
           });
}

// g (n * each, params) becomes the sums over the pieces of each network, (n, params).
template <class T>
static void add_up_pieces(const NetworkBlock<T>& b, Acc<T>* g) {
  const Index params = b.params, each = b.each, run = 4 * lanes<Acc<T>>;
  if (each == 1 || b.n == 0) return;
  parallel(ceil_div(params, run), max(parallel_work / (b.n * each * run), 1),
           [&](Index begin, Index end) {
             const Index q = begin * run, count = min(end * run, params) - q;
             for (Index i = 0; i < b.n * each; ++i)  // what is written has been read
               add_part<Acc<T>>(1, count, g + i * params + q, params, i % each > 0,
                                {g + i / each * params + q, params, 1});
           });
}

// From g (n, params), the gradients of the networks, those of their features: grad_h (n, features).
template <class T>
static void differentiate_features(const NetworkBlock<T>& b, const Acc<T>* g, Acc<T>* grad_h) {
  using C = Acc<T>;
  const Index features = b.p.features;
  multiply<C, T>(b.n, features, b.params, {g, b.params, 1}, b.head(0), {}, {grad_h, features, 1});
}

// The same for large networks, and of the head sums (params, features) and (params), to which `add`
// what was in them. Those that are null are not wanted.
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
  C* parts = grad_h ? scratch<C>(Slot::hidden_a, max(runs * size, 1)) : nullptr;
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
      add_rows<C>(n, count, g + q, params, sum_bias + q);
    }
  });
  for (Index i = 0; parts && i < runs; ++i)
    for (Index j = 0; j < size; ++j) grad_h[j] = i ? grad_h[j] + parts[i * size + j] : parts[j];
}

}  // namespace hyperfast::HF_ISA
