// A layer with lanes along rows: y (n, m) = init + w (n, depth) x (depth, m), each weight read for
// a vector of rows. A sum is finished (activated, say) before it leaves its register. Where weights
// and rows are of bf16 both, two of them are multiplied at once, at twice the rate of floats on a
// Zen 5: such products are exact, and nothing has been rounded for them.
#pragma once

#include "isa/network/activate.h"
#include "isa/network/ahead.h"
#include "isa/product/tile.h"

namespace hyperfast::HF_ISA {

// W is C, or bf16, whose rows lie side by side, anywhere: then rows 2 k and 2 k + 1 of x are row k,
// of pairs, the last of which ends in a 0 if their number is odd.
template <class C, class W = C>
struct LaneProduct {
  static constexpr Index entries = std::is_same_v<W, C> ? 1 : 2;  // in a row of x
  using Step = std::conditional_t<entries == 1, MultiplyAdd, PairDot<C>>;

  Index n, m, depth;
  View<const W> w;
  const C* bias;  // (n), or null
  const C* x;
  Index x_row;  // elements from a row of x to the next one; whole vectors of them are there
  C* y;
  Index row;  // likewise of y
  Ahead* ahead = nullptr;

  // Whole rows of x.
  Index rows() const { return depth / entries; }
  // The weights that a row of x is multiplied by.
  static C weight(const W* from) {
    if constexpr (entries == 1)
      return *from;
    else
      return pair_at(from);
  }
  // The same of the last row of x, if it is not whole.
  static C last_weight(const W* from) { return widen(bf16_pair{*from, {}}); }
};

template <class C, int M, int V>
using Sums = Vec<C>[M][V];

template <class C, int M, int V, class F>
static inline void each_sum(Sums<C, M, V>& sums, const F& f) {
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) f(sums[m][v], m, v * width<C>);
}

// What becomes of M rows of sums, those of y from row o and lane j on: they are stored,
template <class C>
struct Stored {
  C* y;
  Index row;

  template <int M, int V>
  inline void operator()(Sums<C, M, V>& sums, Index o, Index j) const {
    const Index step = row;  // a copy: y might be where it lies, for all a compiler knows
    C* const to = y + o * step + j;
    each_sum<C, M, V>(sums, [=](Vec<C> s, int m, int v) { store(to + m * step + v, s); });
  }
};

// or multiplied by slopes, which lie as y does,
template <class C>
struct TimesSlopes {
  Stored<C> to;
  const C* slopes;

  template <int M, int V>
  inline void operator()(Sums<C, M, V>& sums, Index o, Index j) const {
    const C* const by = slopes + o * to.row + j;
    each_sum<C, M, V>(sums, [&](Vec<C>& s, int m, int v) { s *= load(by + m * to.row + v); });
    to(sums, o, j);
  }
};

// or activated, and the slopes stored if they are wanted.
template <Act kind, bool Slopes>
struct Activated {
  Stored<float> to;
  const Layer& layer;
  float* slopes;

  template <int M, int V>
  inline void operator()(Sums<float, M, V>& sums, Index o, Index j) const {
    const Index row = to.row, at = o * row + j;
    const float parameter = float(layer.parameter);
    if constexpr (kind == Act::sin) {  // one question for all
      VecI largest{};
      each_sum<float, M, V>(sums, [&](VecF& s, int, int) {
        s *= parameter;
        const VecI size = Formula<kind>::size(s);
        largest = size > largest ? size : largest;
      });
      if (any(largest > Formula<kind>::most)) {
        to(sums, o, j);
        return one_by_one(M, V, at);
      }
    }
    float* const values = to.y + at;
    float* const steep = Slopes ? slopes + at : nullptr;
    each_sum<float, M, V>(sums, [=](VecF s, int m, int v) {
      const Floats both = near(s, parameter);
      if constexpr (Slopes) store(steep + m * row + v, both.slope);
      store(values + m * row + v, both.value);
    });
  }

 private:
  static inline Floats near(VecF x, float parameter) {
    if constexpr (kind == Act::sin) return Formula<kind>::near(x, parameter);
    return Formula<kind>::of(x, parameter);
  }
  // Of products that have been stored; not of sums, whose address would keep them in memory.
  void one_by_one(int rows, int vecs, Index at) const {
    for (int m = 0; m < rows; ++m)
      for (int v = 0; v < vecs; ++v) {
        const Index i = at + m * to.row + v * width<float>;
        const Floats both = Formula<Act::sin>::of_product(load(to.y + i), float(layer.parameter));
        if constexpr (Slopes) store(slopes + i, both.slope);
        store(to.y + i, both.value);
      }
  }
};

// M rows of y from o on, and V vectors of them from j on, of `depth` rows of x from k on.
template <int M, int V, class C, class W, class F>
static void lane_tile(const LaneProduct<C, W>& p, Index o, Index j, Index k, Index depth,
                      const F& finish) {
  using Product = LaneProduct<C, W>;
  Sums<C, M, V> sums;
  const C* const part = p.y + o * p.row + j;
  if (k)
    each_sum<C, M, V>(sums, [&](Vec<C>& s, int m, int v) { s = load(part + m * p.row + v); });
  else
    each_sum<C, M, V>(
        sums, [&](Vec<C>& s, int m, int) { s = (p.bias ? p.bias[o + m] : C(0)) - Vec<C>{}; });
  const Index col = p.w.col * Product::entries;
  const W* w[M] = {p.w.at(o, 0).data + k * col};
  for (int m = 1; m < M; ++m) w[m] = w[m - 1] + p.w.row;
  const C* x = p.x + k * p.x_row + j;
  const char* ahead = p.ahead ? p.ahead->take(depth) : nullptr;
  const auto add_row = [&](Sums<C, M, V>& to, const auto& weight) {
    Vec<C> xv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) xv[v] = load(x + v * width<C>);
    each_sum<C, M, V>(to, [&](Vec<C>& s, int m, int v) {
      Product::Step::template step<C>(s, weight(m), xv[v / width<C>]);
    });
    x += p.x_row;
  };
  const auto whole = [&](Sums<C, M, V>& to, Index i) {
    if (ahead) prefetch(ahead + i * 64);
    add_row(to, [&](int m) { return Product::weight(w[m] + i * col); });
  };
  Index i = 0;
  if constexpr (M == 1) {  // too few sums to keep the machine busy: twice as many
    Sums<C, M, V> others{};
    for (; i + 2 <= depth; i += 2) whole(sums, i), whole(others, i + 1);
    each_sum<C, M, V>(sums, [&](Vec<C>& s, int m, int v) { s += others[m][v / width<C>]; });
  }
  for (; i < depth; ++i) whole(sums, i);
  if constexpr (Product::entries == 2)
    if (p.depth % 2 && k + depth == p.rows())
      add_row(sums, [&](int m) { return Product::last_weight(w[m] + depth * col); });
  finish.template operator()<M, V>(sums, o, j);
}

// All rows of y, six at a time, then what is left in steps of 4, 2 and 1.
template <int V, class C, class W, class F>
static void lane_panel(const LaneProduct<C, W>& p, Index j, Index k, Index depth, const F& finish) {
  Index o = 0;
  for (; o + 6 <= p.n; o += 6) lane_tile<6, V>(p, o, j, k, depth, finish);
  if (p.n - o >= 4) lane_tile<4, V>(p, o, j, k, depth, finish), o += 4;
  if (p.n - o >= 2) lane_tile<2, V>(p, o, j, k, depth, finish), o += 2;
  if (p.n - o >= 1) lane_tile<1, V>(p, o, j, k, depth, finish);
}

// The same of so few rows of x, up to three, that they stay in registers while all rows of y pass
// by, four at a time: coordinates, or gradients of few outputs.
template <int D, int V, class F>
static void shallow_panel(const LaneProduct<float>& p, Index j, const F& finish) {
  using C = float;
  constexpr int M = 4;
  const LaneProduct<C> own = p;  // copies, as in Stored
  const F end = finish;
  Vec<C> x[D][V];
#pragma GCC unroll 3
  for (int k = 0; k < D; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[k][v] = load(own.x + k * own.x_row + j + v * width<C>);
  const char* ahead = own.ahead ? own.ahead->take(own.n / M) : nullptr;
  const auto rows = [&](auto count, Index o) {
    constexpr int R = decltype(count)::value;
    Sums<C, R, V> sums;
    each_sum<C, R, V>(
        sums, [&](Vec<C>& s, int m, int) { s = (own.bias ? own.bias[o + m] : C(0)) - Vec<C>{}; });
    const C* const w = own.w.data + o * own.w.row;
#pragma GCC unroll 3
    for (int k = 0; k < D; ++k)
      each_sum<C, R, V>(sums, [&](Vec<C>& s, int m, int v) {
        s += w[m * own.w.row + k * own.w.col] * x[k][v / width<C>];
      });
    end.template operator()<R, V>(sums, o, j);
  };
  Index o = 0;
  for (; o + M <= own.n; o += M) {
    if (ahead) prefetch(ahead + o / M * 64);
    rows(std::integral_constant<int, M>{}, o);
  }
  for (; o < own.n; ++o) rows(std::integral_constant<int, 1>{}, o);
}

// Of a panel of x as deep as stays in the first-level cache (28 of 32 KiB).
template <int V, class C, class W, class F>
static void lane_panels(const LaneProduct<C, W>& p, Index j, const F& finish) {
  constexpr Index most = (28 << 10) / (Index(sizeof(C)) * lanes<C>);
  constexpr Index limit = most > depth_block ? depth_block : most;
  const Index rows = p.rows();
  if constexpr (std::is_same_v<W, float>) {
    if (rows == 1) return shallow_panel<1, V>(p, j, finish);
    if (rows == 2) return shallow_panel<2, V>(p, j, finish);
    if (rows == 3) return shallow_panel<3, V>(p, j, finish);
  }
  const Index step = rows <= limit ? rows : ceil_div(rows, ceil_div(rows, limit));
  for (Index k = 0; k < rows; k += step) {
    const Index depth = min(step, rows - k);
    if (k + depth < rows)
      lane_panel<V>(p, j, k, depth, Stored<C>{p.y, p.row});
    else
      lane_panel<V>(p, j, k, depth, finish);
  }
}

template <class C, class W, class F>
static void multiply_lanes(const LaneProduct<C, W>& p, const F& finish) {
  for (Index j = 0, vecs; j < p.m; j += vecs * width<C>) {
    const Index left = ceil_div(p.m - j, width<C>);
    vecs = left >= tile_vecs ? tile_vecs : left >= 2 ? 2 : 1;
    if (vecs == tile_vecs)
      lane_panels<tile_vecs>(p, j, finish);
    else if (vecs == 2)
      lane_panels<2>(p, j, finish);
    else
      lane_panels<1>(p, j, finish);
  }
}

}  // namespace hyperfast::HF_ISA
