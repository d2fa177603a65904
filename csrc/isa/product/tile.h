// The one inner loop of the library: a tile of C += A B kept in registers, lanes along B's columns.
// Generation, application, outer products and every gradient are made of it.
#pragma once

#include "isa/common.h"
#include "isa/product/pack.h"

namespace hyperfast::HF_ISA {

// 6 x 4 accumulators + 4 of B + 1 of A = 29 of 32 registers; 6 x 2 + 2 + 1 = 15 of 16.
constexpr int tile_rows = 6;
constexpr int tile_vecs = many_registers ? 4 : 2;
template <class C>
constexpr Index lanes = tile_vecs * width<C>;

template <class C>
constexpr Index line = 64 / Index(sizeof(C));

// Depth of a panel of B that stays in the first-level cache: 160 * 64 lanes * 4 bytes = 40 of 48
// KiB.
constexpr Index depth_block = 160;

// What a tile does with an entry of A and the lanes of a row of B.
struct MultiplyAdd {
  template <class C>
  static inline void step(Vec<C>& acc, C a, Vec<C> b) {
    acc += a * b;
  }
};
// The entries are pairs of bf16.
struct AddPairs {
  template <class C>
  static inline void step(Vec<C>& acc, C a, Vec<C> b) {
    acc = add_pairs(acc, a, b);
  }
};
template <class C>
using PairDot = std::conditional_t<has_pair_dot && std::is_same_v<C, float>, AddPairs, MultiplyAdd>;

static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
static inline void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1, 3); }

// What a tile computes: C = init + A B. In one struct, whose pointers move on from tile to tile: as
// arguments the views would be written and read again for each, which waits for the stores.
template <class C>
struct TileOf {
  Index depth;
  View<const C> a;
  const C* b;
  Index b_row;
  int tail;  // > 0: the last vector of B's rows holds only so many elements
  View<const C> init;
  View<C> c;
  int n;           // columns of C
  const C* ahead;  // a line of it is fetched at each step, so far from that of the step before
  Index ahead_step;
};

template <int M, int V, bool Tail, class C, class Step>
static void tile(const TileOf<C>& t) {
  const View<const C> a = t.a, init = t.init;
  const View<C> c = t.c;
  const C *b = t.b, *const ahead = t.ahead;
  const Index depth = t.depth, b_row = t.b_row;
  const int n = t.n, tail = t.tail;
  constexpr int w = width<C>;
  // Sums start from init on every way, so that a result does not depend on how C is cut into tiles.
  // Plain: whole vectors side by side, as nearly always; no branch for each of them.
  const bool plain = c.col == 1 && n == V * w && (!init.data || init.col == 1);
  Vec<C> acc[M][V] = {};
  C spill[M][V * w];
  if (init.data && init.col == 0) {  // one number for all lanes
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[m][v] = init.data[m * init.row] - Vec<C>{};
  } else if (init.data && plain) {
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[m][v] = load(init.data + m * init.row + v * w);
  } else if (init.data && init.col == 1) {
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const C* from = init.data + m * init.row + v * w;
        const int left = n - v * w;
        if (left > 0) acc[m][v] = left < w ? load_part(from, left) : load(from);
      }
  } else if (init.data) {
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < V * w; ++i)
        spill[m][i] = i < n ? init.data[m * init.row + i * init.col] : C(0);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[m][v] = load(&spill[m][v * w]);
  }
  const C* rows[M];
  for (int m = 0; m < M; ++m) rows[m] = a.data + m * a.row;
  for (Index k = 0; k < depth; ++k) {
    Vec<C> bv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      bv[v] = Tail && v == V - 1 ? load_part(b + v * w, tail) : load(b + v * w);
    b += b_row;
    prefetch(ahead + k * t.ahead_step);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const C s = rows[m][k * a.col];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) Step::template step<C>(acc[m][v], s, bv[v]);
    }
  }
  if (plain) {
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(c.data + m * c.row + v * w, acc[m][v]);
  } else if (c.col == 1) {
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        C* to = c.data + m * c.row + v * w;
        const int left = n - v * w;
        if (left >= w)
          store(to, acc[m][v]);
        else if (left > 0)
          store_part(to, acc[m][v], left);
      }
  } else {
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(&spill[m][v * w], acc[m][v]);
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < n; ++i) c.data[m * c.row + i * c.col] = spill[m][i];
  }
}

template <class C>
using Tile = void (*)(const TileOf<C>&);

template <class C, bool Tail, class Step, int M>
constexpr Tile<C> pick(int vecs) {
  if constexpr (tile_vecs == 4) {
    if (vecs == 4) return tile<M, 4, Tail, C, Step>;
    if (vecs == 3) return tile<M, 3, Tail, C, Step>;
  }
  return vecs == 2 ? tile<M, 2, Tail, C, Step> : tile<M, 1, Tail, C, Step>;
}

// Rows of A in steps of 6, then what is left in steps of 4, 2 and 1. Meanwhile a line of what
// `ahead` points to is fetched at each step: by default, what follows the panel; of A, where its
// columns lie lines apart, or where so narrow a panel makes A what is read most, its next six rows,
// if they are as long as the panel is deep (65,536 x 256 from memory by 16 columns: 46 ms become
// 32).
template <class C, bool Tail, class Step = MultiplyAdd>
static void sweep(Index m, int vecs, Index depth, View<const C> a, const C* b, Index b_row,
                  int tail, View<const C> init, View<C> c, int n, const C* ahead = nullptr,
                  Index ahead_step = line<C>) {
  TileOf<C> t{depth, a, b, b_row, tail, init, c, n, ahead ? ahead : b + depth * b_row, ahead_step};
  const bool apart = a.col > line<C>, of_a = !ahead && (apart || (vecs == 1 && a.col == 1));
  if (of_a) {
    t.ahead = apart ? a.at(0, 8).data : a.at(tile_rows, 0).data;
    t.ahead_step = apart ? a.col : tile_rows;
  }
  const auto steps = [&](int height, Tile<C> f) {
    for (; m >= height; m -= height) {
      f(t);
      t.a.data += height * a.row;
      if (init.data) t.init.data += height * init.row;
      t.c.data += height * c.row;
      t.ahead += of_a ? height * a.row : depth * ahead_step;
    }
  };
  steps(6, pick<C, Tail, Step, 6>(vecs));
  if (m == 0) return;
  steps(4, pick<C, Tail, Step, 4>(vecs));
  steps(2, pick<C, Tail, Step, 2>(vecs));
  steps(1, pick<C, Tail, Step, 1>(vecs));
}

// The same where B is one packed panel, of any depth.
template <class C, class Step = MultiplyAdd>
static void sweep_deep(Index m, int vecs, Index depth, View<const C> a, const C* panel,
                       View<const C> init, View<C> c, int n, const C* ahead = nullptr) {
  Index k = 0;
  do {
    const Index dk = min(depth_block, depth - k);
    sweep<C, false, Step>(m, vecs, dk, a.at(0, k), panel + k * lanes<C>, lanes<C>, 0, init, c, n,
                          ahead);
    init = {c.data, c.row, c.col};
    k += dk;
  } while (k < depth);
}

// y (m, n) = part, or y + part.
template <class C>
static void add_part(Index m, Index n, const C* part, Index row, bool add, View<C> y) {
  constexpr Index w = width<C>;
  for (Index i = 0; i < m; ++i, part += row) {
    C* const to = y.at(i, 0).data;
    Index l = 0;
    for (; l + w <= n; l += w) store(to + l, add ? load(to + l) + load(part + l) : load(part + l));
    for (; l < n; ++l) to[l] = add ? to[l] + part[l] : part[l];
  }
}

// sweep_deep, where c is a sum of very many products: of sums of a block's, which loses fewer
// digits; added to c, or not.
template <class C>
static void sweep_sums(Index m, int vecs, Index depth, View<const C> a, const C* panel, bool add,
                       View<C> c, int n) {
  C* part = scratch<C>(Slot::local_c, m * lanes<C>);
  for (Index k = 0; k < depth; k += depth_block) {
    sweep<C, false>(m, vecs, min(depth_block, depth - k), a.at(0, k), panel + k * lanes<C>,
                    lanes<C>, 0, {}, {part, lanes<C>, 1}, n);
    add_part<C>(m, n, part, lanes<C>, add || k, c);
  }
}

// C (m, n) = init + A (m, depth) B (depth, n), lanes along n. Where B's rows are not contiguous
// elements of C's type, panels of it are packed into Slot::panel.
template <class C, class T>
static void multiply(Index m, Index n, Index depth, View<const C> a, View<const T> b,
                     View<const C> init, View<C> c) {
  constexpr bool same = std::is_same_v<C, T>;
  if constexpr (same) {
    if (depth == 1 && !init.data && b.col == 1 && c.col == 1) {  // nothing to keep in registers
      constexpr Index w = width<C>;
      for (Index i = 0; i < m; ++i) {
        const C s = a.data[i * a.row];
        C* to = c.data + i * c.row;
        Index j = 0;
        for (; j + w <= n; j += w) store(to + j, s * load(b.data + j));
        for (; j < n; ++j) to[j] = s * b.data[j];
      }
      return;
    }
  }
  for (Index j = 0; j < n; j += lanes<C>) {
    const int nj = int(min(lanes<C>, n - j));
    const int vecs = int(ceil_div(nj, width<C>));
    View<const C> start = init.data ? init.at(0, j) : init;
    Index k = 0;
    do {
      const Index dk = min(depth_block, depth - k);
      const View<const T> bk = b.at(k, j);
      if constexpr (same) {
        if (b.col == 1) {
          const int tail = nj % width<C>;
          (tail ? sweep<C, true> : sweep<C, false>)(m, vecs, dk, a.at(0, k), bk.data, b.row, tail,
                                                    start, c.at(0, j), nj, nullptr, line<C>);
          start = {c.at(0, j).data, c.row, c.col};
          k += dk;
          continue;
        }
      }
      const Index row = Index(vecs) * width<C>;
      C* panel = scratch<C>(Slot::panel, max(dk, 1) * row);
      pack(dk, nj, bk, panel, row, row);
      sweep<C, false>(m, vecs, dk, a.at(0, k), panel, row, 0, start, c.at(0, j), nj);
      start = {c.at(0, j).data, c.row, c.col};
      k += dk;
    } while (k < depth);
  }
}

}  // namespace hyperfast::HF_ISA
