// All layers of one network for a few hundred of its rows at a time, whose hidden layers stay in
// the second-level cache.
#pragma once

#include "isa/network/activate.h"
#include "isa/product/dot.h"
#include "isa/rows/staged.h"

namespace hyperfast::HF_ISA {

// A network as it is applied: where its parameters start, and for layers that are applied to more
// rows than dot products are good for, their matrices turned into rows of whole vectors of outputs.
template <class W, class C>
struct Network {
  const W* weights;
  const float* scales_and_biases;  // of int8 weights
  const C* transposed;             // or null
  Index ahead;                     // from these weights to those needed next
};

static inline bool is_transposed(const Layer& l) { return l.out > few_outputs; }

template <class C>
static Index transposed_elements(const Net& net) {
  Index n = 0;
  for (Index l = 0; l < net.count; ++l)
    if (is_transposed(net.layers[l])) n += net.layers[l].in * round_up(net.layers[l].out, width<C>);
  return n;
}

// The matrices of a network transposed, or null where `rows` are too few for it.
template <class W, class C>
static const C* transpose_network(const Net& net, const W* weights, bool biases, Index rows) {
  if (rows <= few_rows) return nullptr;
  C* const transposed = scratch<C>(Slot::transposed, max(transposed_elements<C>(net), 1));
  C* to = transposed;
  for (Index l = 0; l < net.count; ++l) {
    const Layer& layer = net.layers[l];
    if (is_transposed(layer)) {
      const Index row = round_up(layer.out, width<C>);
      pack<C, W>(layer.in, layer.out, {weights, 1, layer.in}, to, row, row);
      to += layer.in * row;
    }
    weights += layer.out * (layer.in + biases);
  }
  return transposed;
}

// y (m, out) = x (m, in) times one layer's matrix w (out, in), plus init.
template <class W, class C>
static void apply_matrix(const Layer& l, Index m, View<const C> x, const W* w, const C* transposed,
                         Index ahead, View<const C> init, View<C> y) {
  if (m <= few_rows && !transposed) {
    if (x.col != 1) x = compact(x, m, l.in, Slot::local_b);
    dots<C, W>(l.out, m, l.in, {w, l.in, 1}, x.data, x.row, init.transposed(), y.transposed(),
               ahead);
  } else if (!is_transposed(l)) {
    if (x.col != 1) x = compact(x, m, l.in, Slot::local_b);
    if constexpr (std::is_same_v<W, C>) {
      dots<C, C>(m, l.out, l.in, x, w, l.in, init, y);
    } else {
      C* wide = scratch<C>(Slot::local_d, l.out * l.in);
      for (Index j = 0; j < l.out * l.in; ++j) wide[j] = widen(w[j]);
      dots<C, C>(m, l.out, l.in, x, wide, l.in, init, y);
    }
  } else {
    const Index row = round_up(l.out, width<C>);
    for (Index j = 0; j < l.out; j += lanes<C>) {
      const int n = int(min(lanes<C>, l.out - j));
      sweep<C, false>(m, int(ceil_div(n, width<C>)), l.in, x, transposed + j, row, 0,
                      init.data ? init.at(0, j) : init, y.at(0, j), n);
    }
  }
}

// The layers of one network for m rows, the last one's output in y (m, out); `spare` is for two
// hidden layers. `keep(l, pre)` sees the pre-activations (m, out) of layer l, and says whether what
// follows is wanted. Rows of a layer lie one behind another.
template <class W, class C, class F>
static void run_layers(const Net& net, const Network<W, C>& network, Index m, View<const C> x,
                       C* spare, Index spare_each, C* y, const F& keep) {
  const W* w = network.weights;
  const float* scales_and_biases = network.scales_and_biases;
  const C* transposed = network.transposed;
  for (Index l = 0; l < net.count; ++l) {
    const Layer& layer = net.layers[l];
    C* to = l + 1 == net.count ? y : spare + l % 2 * spare_each;
    const Index matrix = layer.out * layer.in;
    View<const C> init{};
    if (net.bias && !scales_and_biases) {
      if constexpr (std::is_same_v<W, C>) {
        init = {w + matrix, 0, 1};
      } else {
        C* bias = scratch<C>(Slot::local_c, layer.out);
        for (Index o = 0; o < layer.out; ++o) bias[o] = widen(w[matrix + o]);
        init = {bias, 0, 1};
      }
    }
    apply_matrix<W, C>(layer, m, x, w, network.transposed ? transposed : nullptr, network.ahead,
                       init, {to, layer.out, 1});
    if (scales_and_biases) {
      for (Index r = 0; r < m; ++r)
        for (Index o = 0; o < layer.out; ++o) {
          C& v = to[r * layer.out + o];
          v = v * scales_and_biases[o] + (net.bias ? scales_and_biases[layer.out + o] : 0);
        }
      scales_and_biases += layer.out * (1 + net.bias);
    }
    if (!keep(l, to)) return;
    activate<C>(layer, m * layer.out, to, to);
    w += matrix + (scales_and_biases ? 0 : layer.out * net.bias);
    if (is_transposed(layer)) transposed += layer.in * round_up(layer.out, width<C>);
    x = {to, layer.out, 1};
  }
}

// Rows at a time: a hidden layer of them takes 64 KiB at most.
template <class C>
static Index chunk_rows(const Net& net) {
  return min(max((64 << 10) / Index(sizeof(C)) / net.widest / tile_rows * tile_rows, tile_rows),
             512);
}

// The rows of one piece through its network, a chunk at a time.
template <class T, class W>
static void run_piece(const Net& net, const Groups& groups, const Piece& q, const Rows& x,
                      const Rows& y, void* preactivations, Network<W, Acc<T>> network) {
  using C = Acc<T>;
  const Index chunk = chunk_rows<C>(net), most = chunk * net.widest, rows = total_rows(groups);
  C* spare = scratch<C>(Slot::block, 3 * most);
  network.transposed = transpose_network<W, C>(
      net, network.weights, net.bias && !network.scales_and_biases, q.end - q.begin);
  const Index out = net.layers[net.count - 1].out;
  for (Index r = q.begin; r < q.end; r += chunk) {
    const Piece part{q.task, r, min(r + chunk, q.end)};
    const View<const C> inputs = gather<T>(x, groups, part, net.layers[0].in, Slot::local_a);
    const bool direct = in_place<T>(groups);
    C* to = direct ? reinterpret_cast<C*>(row_data<T>(y, groups, part, r)) : spare + 2 * most;
    T* pre = static_cast<T*>(preactivations);
    run_layers<W, C>(
        net, network, part.end - part.begin, inputs, spare, most, to, [&](Index l, const C* from) {
          if (!pre || !net.layers[l].kept) return true;
          const Index width = net.layers[l].out;
          scatter<T>(dense_rows(pre, groups, width), groups, part, width, from, nullptr, 0);
          pre += rows * width;
          return true;
        });
    if (!direct) scatter<T>(y, groups, part, out, to, nullptr, 0);
  }
}

}  // namespace hyperfast::HF_ISA
