// Matrices in panels, whose columns are the lanes of a tile: packed once for many products, or the
// sum of many.
#pragma once

#include "isa/product/tile.h"

namespace hyperfast::HF_ISA {

// A matrix (depth, n).
template <class C>
struct Panels {
  Index depth, n;
  C* data;

  static Index size(Index depth, Index n) { return round_up(n, lanes<C>) * depth; }
  Index size() const { return size(depth, n); }
  Index panels() const { return ceil_div(n, lanes<C>); }

  void pack(View<const C> b) const {
    const Index work = max(depth * lanes<C>, 1);
    parallel(ceil_div(n, lanes<C>), ceil_div(Index{1} << 15, work), [&](Index first, Index last) {
      for (Index j = first * lanes<C>; j < min(last * lanes<C>, n); j += lanes<C>)
        HF_ISA::pack<C, C>(depth, min(lanes<C>, n - j), b.at(0, j), data + j * depth, lanes<C>,
                           lanes<C>);
    });
  }
  void unpack(View<C> to) const {
    for (Index j = 0; j < n; j += lanes<C>)
      for (Index i = 0; i < depth; ++i)
        for (Index k = 0; k < min(lanes<C>, n - j); ++k)
          *to.at(i, j + k).data = data[j * depth + i * lanes<C> + k];
  }

  // C (m, n) = init + A B, where B is this. Meanwhile lines from `ahead` on are fetched, if given.
  void multiply(Index m, View<const C> a, View<const C> init, View<C> c,
                const C* ahead = nullptr) const {
    for (Index j = 0; j < n; j += lanes<C>) {
      const int nj = int(min(lanes<C>, n - j));
      sweep_deep<C>(m, int(ceil_div(nj, width<C>)), depth, a, data + j * depth,
                    init.data ? init.at(0, j) : init, c.at(0, j), nj,
                    ahead ? ahead + j / lanes<C> * fetched(m) : nullptr);
    }
  }
  // How many elements of what lies ahead are fetched by a product of m rows with one panel.
  Index fetched(Index m) const { return ceil_div(m, tile_rows) * depth * line<C>; }

  // Adds A^T B to `count` rows of this from `first` on, A (m, count), B (m, n), of contiguous rows.
  // The rows of a tile are fetched during the one before: such sums pass through the cache, and to
  // wait for them took a tenth of the product.
  void add(Index first, Index count, Index m, const C* a, Index a_row, const C* b,
           Index b_row) const {
    constexpr Index next = tile_rows * lanes<C>;
    for (Index j = 0; j < n; j += lanes<C>) {
      const int nj = int(min(lanes<C>, n - j)), tail = nj % width<C>;
      C* const sum = data + j * depth + first * lanes<C>;
      (tail ? sweep<C, true> : sweep<C, false>)(count, int(ceil_div(nj, width<C>)), m,
                                                {a, 1, a_row}, b + j, b_row, tail,
                                                {sum, lanes<C>, 1}, {sum, lanes<C>, 1}, nj,
                                                sum + next, max(next / max(m, 1), 1));
    }
  }
  void add(Index m, const C* a, Index a_row, const C* b, Index b_row) const {
    add(0, depth, m, a, a_row, b, b_row);
  }
};

}  // namespace hyperfast::HF_ISA
