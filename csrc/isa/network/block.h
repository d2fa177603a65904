// A block of whole networks and what makes them: their parameters w (n, params) are h W^T and
// biases; from the gradients g of these come those of the head, g^T h, and those of its features, g
// W.
#pragma once

#include "isa/layer/head.h"
#include "isa/product/dot.h"
#include "plan.h"

namespace hyperfast::HF_ISA {

// Weights (or their gradients) of a block of networks.
template <class C>
constexpr Index networks_elements = networks_bytes / Index(sizeof(C));

// Networks first, ..., first + n - 1, each for so many pieces of rows.
template <class T>
struct NetworkBlock {
  const HyperMlp& p;
  Index first, n, each, params;
  const Acc<T>* panels;  // of the head, or null
  bool few;              // dot products with the head's rows
  bool pairs;            // features go in pairs of bf16

  NetworkBlock part(Index begin, Index end) const {
    return {p, first + begin, end - begin, each, params, panels, few, pairs};
  }

  // What network u of the block is made from.
  Index task(Index u) const { return piece(p.groups, (first + u) * each).task; }

  // The head's rows from parameter q on.
  View<const T> head(Index q) const {
    return {static_cast<const T*>(p.head.weight) + q * p.head.row, p.head.row, p.head.feature};
  }
  Acc<T> bias(Index q) const {
    return p.head.bias ? widen(static_cast<const T*>(p.head.bias)[q * p.head.bias_step]) : 0;
  }
};

template <class T>
static NetworkBlock<T> network_block(const HyperMlp& p, Index first, Index n, Index each,
                                     const Acc<T>* panels) {
  const bool few = p.head.feature == 1 && n <= few_rows;
  return {p, first, n, each, p.net.params, panels, few, pairs_of<T>(p.head.feature) && !few};
}

// The features of all networks, (n, features). A thread copies those of the networks that it makes:
// what another one has written comes from its cache, which took 256 networks of 2-32-1 as long as
// to make them.
template <class T>
static const Acc<T>* rows_of_features(const NetworkBlock<T>& b, Slot slot) {
  const Index features = b.p.features;
  Acc<T>* const to = scratch<Acc<T>>(slot, max(b.n * features, 1));
  for (Index u = 0; u < b.n; ++u)
    copy_features<T>(b.p.h, b.task(u), features, false, to + u * features);
  return to;
}

// The same as they lie, if they are rows already.
template <class T>
static View<const Acc<T>> rows_in_place(const NetworkBlock<T>& b) {
  const TaskVector& h = b.p.h;
  if constexpr (std::is_same_v<T, Acc<T>>)
    if (!b.p.groups.ragged && b.p.groups.per_task == b.each && h.col == 1)
      return {static_cast<const T*>(h.data) + b.first * h.task, h.task, 1};
  return {rows_of_features(b, Slot::features), b.p.features, 1};
}

// Networks whose parameters are made at once, and parameters at a time: lanes are networks, and the
// head's rows are read as they lie, or, of 16 bits, widened once for all networks. Packed instead,
// with lanes along the parameters, 512 networks of 33,024 and 128 features took 67 ms on one
// thread, and this way 42, at 90% of what the machine can multiply and add (AMD Zen 4).
template <class C>
constexpr Index networks_strip = 2 * width<C>;
constexpr Index parameters_strip = 48;

// `count` of the head's rows from parameter q on, as they are multiplied.
template <class T>
static View<const Acc<T>> head_rows(const NetworkBlock<T>& b, Index q, Index count) {
  using C = Acc<T>;
  const View<const T> rows = b.head(q);
  if constexpr (std::is_same_v<T, C>)
    if (rows.col == 1) return rows;
  const Index features = b.p.features;
  C* const to = scratch<C>(Slot::local_a, max(count * features, 1));
  pack<C, T>(count, features, rows, to, features, features);
  return {to, features, 1};
}

// The features of all networks: strips of lanes, each (features, networks_strip), one behind
// another.
template <class T>
static const Acc<T>* lanes_of_features(const NetworkBlock<T>& b) {
  using C = Acc<T>;
  constexpr Index strip = networks_strip<C>;
  const TaskVector& h = b.p.h;
  const Index features = b.p.features;
  C* const to = scratch<C>(Slot::panel, max(round_up(b.n, strip) * features, 1));
  for (Index u = 0; u < b.n; u += strip) {
    const Index n = min(strip, b.n - u);
    const T* from[strip];
    for (Index l = 0; l < n; ++l) from[l] = static_cast<const T*>(h.data) + b.task(u + l) * h.task;
    pack_lanes<C, T>(from, n, features, h.col, to + u * features, strip, strip);
  }
  return to;
}

// The networks' parameters [q, q + count), of which there are at most parameters_strip.
template <class T>
static void generate_in_lanes(const NetworkBlock<T>& b, Index q, Index count, const Acc<T>* h,
                              const Acc<T>* bias, View<Acc<T>> w) {
  using C = Acc<T>;
  constexpr Index strip = networks_strip<C>, line = 64 / Index(sizeof(C));
  const Index depth = b.p.features, step = depth_block * lanes<C> / strip;
  const View<const C> head = head_rows(b, q, count);
  const C* const next = head.at(parameters_strip, 0).data;
  C made[parameters_strip * strip];
  for (Index u = 0; u < b.n; u += strip, h += strip * depth) {
    const Index n = min(strip, b.n - u), row = round_up(n, width<C>);
    for (Index j = 0; j < n; ++j)  // what will be written, while it is made
      for (Index l = 0; l < count; l += line) prefetch_to_write(w.at(u + j, l).data);
    View<const C> init{bias, 1, 0};
    Index k = 0;
    do {
      sweep<C, false>(count, int(row / width<C>), min(step, depth - k), head.at(0, k),
                      h + k * strip, strip, 0, init, {made, strip, 1}, int(row),
                      next + k * parameters_strip, tile_rows);
      init = {made, strip, 1};
      k += step;
    } while (k < depth);
    pack<C, C>(n, count, {made, 1, strip}, w.at(u, 0).data, w.row, count);
  }
}

// In pairs of bf16 the lanes are parameters: the head takes half the room then, and one of several
// blocks of networks is packed once for all. 512 networks of 33,024 and 128 features, 64 rows: 10.5
// ms, where 64 of them as lanes took 10.8 and 32 took 11.1 (AMD Zen 5, two threads).
template <class C>
constexpr Index pair_panel = lanes<C>;

static inline Index pair_depth(const HyperMlp& p) { return ceil_div(p.features, 2); }

// `count` of the head's rows from parameter q on, at most a panel.
static inline void pack_head_pairs(const HyperMlp& p, Index q, Index count, float* to) {
  const bf16* rows[pair_panel<float>];
  const bf16 none[pair_panel<float>] = {};
  for (Index l = 0; l < count; ++l)
    rows[l] = static_cast<const bf16*>(p.head.weight) + (q + l) * p.head.row;
  pack_pairs(rows, none, count, p.features, pair_depth(p), to);
}

// Panels of the head's rows from parameter `from` on, for networks in so many blocks; null where
// they are not worth keeping.
template <class T>
static const Acc<T>* pack_head(const HyperMlp& p, Index from, Index blocks) {
  using C = Acc<T>;
  if constexpr (may_pair<T>) {
    constexpr Index run = pair_panel<C>;
    const Index params = p.net.params - from, depth = pair_depth(p);
    const Index size = round_up(params, run) * depth;
    if (!pairs_of<T>(p.head.feature) || blocks < 2 || size > networks_elements<C>) return nullptr;
    C* const to = scratch<C>(Slot::head, max(size, 1));
    parallel(ceil_div(params, run), max(parallel_work / (8 * max(run * depth, 1)), 1),
             [&](Index begin, Index end) {
               for (Index q = begin * run; q < min(end * run, params); q += run)
                 pack_head_pairs(p, from + q, min(run, params - q), to + q * depth);
             });
    return to;
  }
  return nullptr;
}

// The features of all networks in pairs: (n, depth).
static inline const float* pairs_of_features(const NetworkBlock<bf16>& b) {
  const Index features = b.p.features, depth = pair_depth(b.p);
  float* const to = scratch<float>(Slot::panel, max(b.n * depth, 1));
  for (Index u = 0; u < b.n; ++u)
    copy_feature_pairs(b.p.h, b.task(u), features, false, to + u * depth);
  return to;
}

// The networks' parameters [q, q + count), of which there are at most a panel.
static inline void generate_in_pairs(const NetworkBlock<bf16>& b, Index from, Index q, Index count,
                                     const float* h, const float* bias, View<float> w) {
  const Index depth = pair_depth(b.p);
  const float* panel = nullptr;
  if (b.panels) {
    panel = b.panels + (q - from) * depth;
  } else {
    float* const packed = scratch<float>(Slot::local_a, max(depth, 1) * pair_panel<float>);
    pack_head_pairs(b.p, q, count, packed);
    panel = packed;
  }
  sweep_deep<float, PairDot<float>>(b.n, int(ceil_div(count, width<float>)), depth, {h, depth, 1},
                                    panel, {bias, 0, 1}, w, int(count));
}

// The features of all networks, as these are made.
template <class T>
static const Acc<T>* features_of(const NetworkBlock<T>& b) {
  if (b.few) return rows_of_features(b, Slot::panel);
  if constexpr (may_pair<T>)
    if (b.pairs) return pairs_of_features(b);
  return lanes_of_features(b);
}

// The networks' parameters [q, q + count), of which there are at most a strip, or a panel
// of pairs.
template <class T>
static void generate_some(const NetworkBlock<T>& b, Index from, Index q, Index count,
                          const Acc<T>* h, Acc<T>* w) {
  using C = Acc<T>;
  C bias[max(pair_panel<C>, parameters_strip)];
  for (Index j = 0; j < count; ++j) bias[j] = b.bias(q + j);
  const View<C> to{w + q - from, b.params - from, 1};
  if (b.few)
    dots<C, T>(count, b.n, b.p.features, b.head(q), h, b.p.features, {bias, 1, 0}, to.transposed());
  else if (!b.pairs)
    generate_in_lanes(b, q, count, h, bias, to);
  else if constexpr (may_pair<T>)
    generate_in_pairs(b, from, q, count, h, bias, to);
}

// The networks' parameters from number `from` on: w (n, params - from).
template <class T>
static void generate_networks(const NetworkBlock<T>& b, Index from, Acc<T>* w) {
  const Index run = b.pairs ? pair_panel<Acc<T>> : parameters_strip;
  const Index grain = parallel_work / max(b.n * run * b.p.features, 1);
  each_thread(ceil_div(b.params - from, run), max(grain, 1), [&](Work& work) {
    Index begin, end;
    if (!work.take(begin, end)) return;
    const Acc<T>* const h = features_of(b);
    do {
      for (Index q = from + begin * run; q < min(from + end * run, b.params); q += run)
        generate_some<T>(b, from, q, min(run, b.params - q), h, w);
    } while (work.take(begin, end));
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
  // A thread makes small ones itself, a strip of lanes at least, in four parts.
  constexpr Index strip = networks_strip<Acc<T>>;
  const Index share = ceil_div(b.n, thread_count());
  if (!small_networks(b) || share < strip) {
    generate_networks<T>(b, from, w);
    return parallel(b.n * b.each, max(parallel_work / work, 1), body);
  }
  const Index some = round_up(ceil_div(share, 4), strip);
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
  const View<const C> h = sum_weight ? rows_in_place(b) : View<const C>{};
  C* parts = grad_h ? scratch<C>(Slot::hidden_a, max(runs * size, 1)) : nullptr;
  parallel(runs, max(parallel_work / max(run * size, 1), 1), [&](Index first, Index last) {
    for (Index i = first; i < last; ++i) {
      const Index q = i * run, count = min(run, params - q);
      if (parts)
        multiply<C, T>(n, features, count, {g + q, params, 1}, b.head(q), {},
                       {parts + i * size, features, 1});
      if (sum_weight) {
        const View<C> to{sum_weight + q * features, features, 1};
        multiply<C, C>(count, features, n, View<const C>{g + q, 1, params}, h,
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
