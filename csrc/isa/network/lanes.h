// A layer with lanes along rows: y (n, m) = init + w (n, depth) x (depth, m), each weight read for
// a vector of rows. A sum is finished (activated, say) before it leaves its register.
#pragma once

#include "isa/network/activate.h"
#include "isa/network/ahead.h"
#include "isa/product/tile.h"

namespace hyperfast::HF_ISA {

template <class C>
struct LaneProduct {
  Index n, m, depth;
  View<const C> w;
  const C* bias;  // (n), or null
  const C* x;
  Index x_row;  // elements from a row of x to the next one; whole vectors of them are there
  C* y;
  Index row;  // likewise of y
  Ahead* ahead = nullptr;
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
    C* const to = y + o * row + j;
    each_sum<C, M, V>(sums, [&](Vec<C> s, int m, int v) { store(to + m * row + v, s); });
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
    const Index at = o * to.row + j;
    const float parameter = float(layer.parameter);
    if constexpr (kind == Act::sin) {  // one question for all
      VecI largest{};
      each_sum<float, M, V>(sums, [&](VecF s, int, int) {
        const VecI size = Formula<kind>::size(s * parameter);
        largest = size > largest ? size : largest;
      });
      if (any(largest > Formula<kind>::most)) return one_by_one<M, V>(sums, o, j);
    }
    each_sum<float, M, V>(sums, [&](VecF& s, int m, int v) {
      const Floats both = near(s, parameter);
      if constexpr (Slopes) store(slopes + at + m * to.row + v, both.slope);
      s = both.value;
    });
    to(sums, o, j);
  }

 private:
  static inline Floats near(VecF x, float parameter) {
    if constexpr (kind == Act::sin) return Formula<kind>::near(x * parameter, parameter);
    return Formula<kind>::of(x, parameter);
  }
  template <int M, int V>
  void one_by_one(Sums<float, M, V>& sums, Index o, Index j) const {
    to(sums, o, j);
    for (int m = 0; m < M; ++m) {
      const Index at = (o + m) * to.row + j;
      float* const y = to.y + at;
      if constexpr (Slopes)
        activate_and_slope<float>(layer, V * width<float>, y, slopes + at);
      else
        activate<float>(layer, V * width<float>, y, y);
    }
  }
};

// M rows of y from o on, and V vectors of them from j on, of `depth` products from k on.
template <int M, int V, class C, class F>
static void lane_tile(const LaneProduct<C>& p, Index o, Index j, Index k, Index depth,
                      const F& finish) {
  Sums<C, M, V> sums;
  const C* const part = p.y + o * p.row + j;
  if (k)
    each_sum<C, M, V>(sums, [&](Vec<C>& s, int m, int v) { s = load(part + m * p.row + v); });
  else
    each_sum<C, M, V>(
        sums, [&](Vec<C>& s, int m, int) { s = (p.bias ? p.bias[o + m] : C(0)) - Vec<C>{}; });
  const C* w[M];
  for (int m = 0; m < M; ++m) w[m] = p.w.at(o + m, k).data;
  const C* x = p.x + k * p.x_row + j;
  const char* ahead = p.ahead ? p.ahead->take(depth) : nullptr;
  for (Index i = 0; i < depth; ++i, x += p.x_row) {
    if (ahead) prefetch(ahead + i * 64);
    Vec<C> xv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) xv[v] = load(x + v * width<C>);
    each_sum<C, M, V>(sums,
                      [&](Vec<C>& s, int m, int v) { s += w[m][i * p.w.col] * xv[v / width<C>]; });
  }
  finish.template operator()<M, V>(sums, o, j);
}

// All rows of y, six at a time, then what is left in steps of 4, 2 and 1.
template <int V, class C, class F>
static void lane_panel(const LaneProduct<C>& p, Index j, Index k, Index depth, const F& finish) {
  Index o = 0;
  for (; o + 6 <= p.n; o += 6) lane_tile<6, V, C>(p, o, j, k, depth, finish);
  if (p.n - o >= 4) lane_tile<4, V, C>(p, o, j, k, depth, finish), o += 4;
  if (p.n - o >= 2) lane_tile<2, V, C>(p, o, j, k, depth, finish), o += 2;
  if (p.n - o >= 1) lane_tile<1, V, C>(p, o, j, k, depth, finish);
}

// As deep at a time as a panel of x stays in the first-level cache (28 of 32 KiB).
template <class C, class F>
static void multiply_lanes(const LaneProduct<C>& p, const F& finish) {
  constexpr int w = width<C>;
  constexpr Index most = (28 << 10) / (Index(sizeof(C)) * lanes<C>);
  const Index step = ceil_div(p.depth, ceil_div(p.depth, most > depth_block ? depth_block : most));
  for (Index j = 0, vecs; j < p.m; j += vecs * w) {
    const Index left = ceil_div(p.m - j, w);
    vecs = left >= tile_vecs ? tile_vecs : left >= 2 ? 2 : 1;
    for (Index k = 0; k < p.depth; k += step) {
      const Index depth = min(step, p.depth - k);
      const auto panel = [&](const auto& end) {
        if (vecs == tile_vecs) return lane_panel<tile_vecs, C>(p, j, k, depth, end);
        if (vecs == 2) return lane_panel<2, C>(p, j, k, depth, end);
        lane_panel<1, C>(p, j, k, depth, end);
      };
      if (k + depth < p.depth)
        panel(Stored<C>{p.y, p.row});
      else
        panel(finish);
    }
  }
}

}  // namespace hyperfast::HF_ISA
