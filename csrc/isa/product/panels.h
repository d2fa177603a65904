// A matrix packed into panels once, for many products with it.
#pragma once

#include "isa/product/tile.h"

namespace hyperfast::HF_ISA {

// B (depth, n), the lanes of a tile side by side.
template <class C>
struct Panels {
  Index depth, n;
  C* data;

  static Index size(Index depth, Index n) { return round_up(n, lanes<C>) * depth; }

  void pack(View<const C> b) const {
    const Index panels = ceil_div(n, lanes<C>);
    parallel(panels, ceil_div(Index{1} << 15, max(depth * lanes<C>, 1)),
             [&](Index first, Index last) {
               for (Index j = first * lanes<C>; j < min(last * lanes<C>, n); j += lanes<C>)
                 HF_ISA::pack<C, C>(depth, min(lanes<C>, n - j), b.at(0, j), data + j * depth,
                                    lanes<C>, lanes<C>);
             });
  }

  // C (m, n) = init + A B.
  void multiply(Index m, View<const C> a, View<const C> init, View<C> c) const {
    for (Index j = 0; j < n; j += lanes<C>) {
      const int nj = int(min(lanes<C>, n - j));
      sweep_deep<C>(m, int(ceil_div(nj, width<C>)), depth, a, data + j * depth,
                    init.data ? init.at(0, j) : init, c.at(0, j), nj);
    }
  }
};

}  // namespace hyperfast::HF_ISA
