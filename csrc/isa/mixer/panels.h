// The weights of a mixer as its products read them, lanes along outputs, each piece padded to whole
// vectors; and where everything lies.
//
// The layers that read the state are one matrix. Columns of W1 are ordered by vectors of the
// embedding, and of each by agents: what one vector of hidden values adds up lies side by side.
#pragma once

#include "isa/network/lanes.h"
#include "isa/product/arena.h"
#include "isa/product/sums.h"
#include "isa/rows/pieces.h"
#include "mixer.h"

namespace hyperfast::HF_ISA {

// Where the pieces of a row lie: the hidden layers of W1, of W2 and of V, and b1.
template <class C>
struct MixerColumns {
  Index agents, state, embed, hyper;
  Index H, E;  // padded
  Index of_w2, of_v, of_b1, all;
  Index vecs, w2, w1;  // vectors of an embedding; columns of W2 and of W1

  explicit MixerColumns(const Mixer<C>& p)
      : agents(p.agents),
        state(p.state),
        embed(p.embed),
        hyper(p.hyper),
        H(p.padded(p.hyper)),
        E(p.padded(p.embed)),
        of_w2(H),
        of_v(2 * H),
        of_b1(2 * H + E),
        all(p.kept_width()),
        vecs(ceil_div(p.embed, width<C>)),
        w2(vecs * width<C>),
        w1(p.agents * w2) {}

  // Whether there are columns that no layer fills.
  bool pads() const { return H > hyper || E > embed; }

  // Calls body(first column, count) for the columns between pieces, which no layer fills.
  template <class F>
  void each_gap(const F& body) const {
    for (Index piece : {Index(0), of_w2}) body(piece + hyper, H - hyper);
    for (Index piece : {of_v, of_b1}) body(piece + embed, E - embed);
  }
  // Calls body(column, output, count) for each run of columns of W1 that are outputs side by side.
  template <class F>
  void each_run_of_w1(const F& body) const {
    for (Index v = 0; v * width<C> < embed; ++v)
      for (Index i = 0; i < agents; ++i)
        body((v * agents + i) * width<C>, i * embed + v * width<C>,
             min(width<C>, embed - v * width<C>));
  }
  // Calls body(first column, outputs, layer) for each layer that reads the state.
  template <class W, class F>
  void each_reading(const W& w, const F& body) const {
    body(0, hyper, w.into_w1);
    body(of_w2, hyper, w.into_w2);
    body(of_v, embed, w.into_v);
    body(of_b1, embed, w.b1);
  }
};

// A matrix (depth, columns) and a bias, for products with lanes along its columns.
template <class C>
struct Lanes {
  Index depth, columns, row;
  C *data, *bias;

  Lanes(Arena<C>& space, Index depth, Index columns)
      : depth(depth),
        columns(columns),
        row(odd_lines<C>(columns)),
        data(space.take(depth * row)),
        bias(space.take(columns)) {}

  void clear() const {
    std::memset(data, 0, depth * row * sizeof(C));
    std::memset(bias, 0, columns * sizeof(C));
  }
  // n outputs of a layer, from `output` on, as columns.
  void take(Index column, Index output, Index n, Linear<const C> l) const {
    pack<C, C>(depth, n, {l.weight + output * depth, 1, depth}, data + column, row, n);
    std::memcpy(bias + column, l.bias + output, n * sizeof(C));
  }
  // y (m, columns) = x times the matrix, and what `finish` makes of it.
  template <class F>
  void multiply(Index m, View<const C> x, View<C> y, const F& finish) const {
    multiply_lanes<C>(LaneProduct<C>{m, columns, depth, x, nullptr, data, row, y.data, y.row},
                      finish);
  }
  // Columns [first, first + n) alone.
  Lanes part(Index first, Index n) const {
    Lanes some = *this;
    some.columns = n, some.data += first, some.bias += first;
    return some;
  }
};

// Products that both ways need.
template <class C>
struct MixerPanels {
  MixerColumns<C> at;
  Lanes<C> w1, w2;

  MixerPanels(Arena<C>& space, const Mixer<C>& p)
      : at(p), w1(space, p.hyper, at.w1), w2(space, p.hyper, at.w2) {}
  void pack(const Mixer<C>& p) const {
    if (at.pads()) w1.clear(), w2.clear();
    at.each_run_of_w1([&](Index column, Index o, Index n) { w1.take(column, o, n, p.w.w1); });
    w2.take(0, 0, p.embed, p.w.w2);
  }
};

template <class C>
static inline Vec<C> magnitude_of(Vec<C> x) {
  if constexpr (std::is_same_v<C, float>)
    return magnitude(x);
  else
    return x < C(0) ? -x : x;
}
// grad times the slope of the magnitude at x; a NaN stays one.
template <class C>
static inline Vec<C> by_sign(Vec<C> x, Vec<C> grad) {
  const Vec<C> up = x > C(0) ? grad : Vec<C>{}, slope = x < C(0) ? -grad : up;
  return x == x ? slope : x;
}

// Stored with a bias of the lanes added.
template <class C>
struct Biased {
  Stored<C> to;
  const C* bias;

  template <int M, int V>
  inline void operator()(Sums<C, M, V>& sums, Index o, Index j) const {
    each_sum<C, M, V>(sums, [&](Vec<C>& s, int, int v) { s += load(bias + j + v); });
    to(sums, o, j);
  }
};

// Calls body(i, lanes): for the vectors of n elements, and how many lanes of each there are.
template <class C, class F>
static inline void each_padded(Index n, const F& body) {
  for (Index i = 0; i < n; i += width<C>) body(i, int(min(width<C>, n - i)));
}

// Zero where there is nothing: what is infinite elsewhere in a row makes numbers of no meaning
// there.
template <class C>
static inline Vec<C> only(Vec<C> v, int lanes) {
  if (lanes < width<C>)
    for (int i = lanes; i < width<C>; ++i) v[i] = 0;
  return v;
}

// Rows that a thread takes at a time through all layers, at most: what these make stays in the
// second-level cache.
static inline Index rows_together(Index rows, Index most, Index threads) {
  const Index blocks = round_up(ceil_div(max(rows, 1), most), threads);
  return min(round_up(ceil_div(max(rows, 1), blocks), tile_rows), most);
}

}  // namespace hyperfast::HF_ISA
