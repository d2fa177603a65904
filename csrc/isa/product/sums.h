// Sums over the lanes: products of the rows of two matrices that are as long as there are rows of a
// task, while their number may be any, and sums of such rows. As many sums as a vector has lanes
// are formed at once, so that one pass over the lanes ends them all.
#pragma once

#include "isa/product/pack.h"

namespace hyperfast::HF_ISA {

// M rows of a by N of b, M N = width<C>, of which m and n are there: y [+]= a b^T. Rows of a begin
// where row(i) says.
template <int N, class C, class Row>
static void dot_tile(Index m, Index n, Index depth, const Row& row, View<const C> b, bool add,
                     View<C> y) {
  constexpr int w = width<C>, M = w / N;
  const C *rows_a[M], *rows_b[N];
  for (int i = 0; i < M; ++i) rows_a[i] = row(min(i, m - 1));
  for (int j = 0; j < N; ++j) rows_b[j] = b.data + min(j, n - 1) * b.row;
  Vec<C> acc[w] = {};
  const auto step = [&](const auto& read) {
    Vec<C> bv[N];
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) bv[j] = read(rows_b[j]);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Vec<C> av = read(rows_a[i]);
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) acc[i * N + j] += av * bv[j];
    }
  };
  Index k = 0;
  for (; k + w <= depth; k += w) step([=](const C* row) { return load(row + k); });
  if (k < depth) step([=](const C* row) { return load_part(row + k, int(depth - k)); });
  C s[w];
  store(s, sums<C>(acc));
  for (Index i = 0; i < m; ++i)
    for (Index j = 0; j < n; ++j) {
      C& to = y.data[i * y.row + j * y.col];
      to = add ? to + s[i * N + j] : s[i * N + j];
    }
}

// y (m, n) [+]= a b^T, along rows of a and b whose elements lie side by side.
template <int N, class C, class Row>
static void dot_tiles(Index m, Index n, Index depth, const Row& row, View<const C> b, bool add,
                      View<C> y) {
  constexpr Index M = width<C> / N;
  for (Index i = 0; i < m; i += M)
    for (Index j = 0; j < n; j += N)
      dot_tile<N, C>(
          min(M, m - i), min(N, n - j), depth, [&](Index r) { return row(i + r); }, b.at(j, 0), add,
          y.at(i, j));
}

// The fewest tiles that hold m x n sums, and of how many columns each is; of as many, the squarest.
struct DotShape {
  Index columns, tiles;

  template <class C>
  static DotShape of(Index m, Index n) {
    constexpr Index w = width<C>;
    DotShape best{0, INT64_MAX};
    for (Index c = 1; c <= w; c *= 2) {
      const Index tiles = ceil_div(m, w / c) * ceil_div(n, c);
      if (tiles < best.tiles || (tiles == best.tiles && c * c <= w)) best = {c, tiles};
    }
    return best;
  }

  // Whether m x n sums of so many products are sooner formed over the lanes, at a cost of 3
  // multiply-adds of vectors each, than with lanes along the n, some of which may be empty, for
  // which b is turned around, a vector at a cost of 6.
  template <class C>
  bool pays(Index m, Index n, Index depth) const {
    constexpr Index w = width<C>;
    const Index vecs = ceil_div(depth, w);
    return tiles * w * (vecs + 3) < n * vecs * 6 + m * ceil_div(n, w) * depth;
  }
};

template <class C, class Row>
static void dot_tiles(DotShape shape, Index m, Index n, Index depth, const Row& row,
                      View<const C> b, bool add, View<C> y) {
  const auto with = [&](auto columns) {
    constexpr int N = decltype(columns)::value;
    if constexpr (N <= width<C>) dot_tiles<N, C>(m, n, depth, row, b, add, y);
  };
  switch (shape.columns) {
    case 1: return with(std::integral_constant<int, 1>{});
    case 2: return with(std::integral_constant<int, 2>{});
    case 4: return with(std::integral_constant<int, 4>{});
    case 8: return with(std::integral_constant<int, 8>{});
    default: return with(std::integral_constant<int, 16>{});
  }
}

template <class C>
static void dot_tiles(DotShape shape, Index m, Index n, Index depth, View<const C> a,
                      View<const C> b, bool add, View<C> y) {
  dot_tiles<C>(shape, m, n, depth, [&](Index i) { return a.data + i * a.row; }, b, add, y);
}

// y (n) [+]= the sums of n rows of a, each of `depth` elements side by side.
template <class C>
static void row_sums(Index n, Index depth, View<const C> a, bool add, C* y) {
  constexpr int w = width<C>;
  for (Index i = 0; i < n; i += w) {
    const int count = int(min(w, n - i));
    const C* rows[w];
    for (int r = 0; r < w; ++r) rows[r] = a.at(min(i + r, n - 1), 0).data;
    Vec<C> acc[w] = {};
    Index k = 0;
    for (; k + w <= depth; k += w)
#pragma GCC unroll 16
      for (int r = 0; r < w; ++r) acc[r] += load(rows[r] + k);
    for (int r = 0; k < depth && r < w; ++r) acc[r] += load_part(rows[r] + k, int(depth - k));
    Vec<C> s = sums<C>(acc);
    if (add) s += load_part(y + i, count);
    store_part(y + i, s, count);
  }
}

}  // namespace hyperfast::HF_ISA
