// Many rows of a network with lanes along them: a layer's values are (columns, rows), so that
// narrow layers fill vectors too, and weights are read as they lie, one entry for a vector of rows.
#pragma once

#include "isa/network/weights.h"
#include "isa/product/dot.h"
#include "isa/rows/staged.h"

namespace hyperfast::HF_ISA {

template <class C>
struct Many {
  Index m;
  Index row;  // elements from a column's values to the next one's

  explicit Many(Index m) : m(m), row(odd_lines<C>(m)) {}

  Index size(Index columns) const { return row * columns; }

  const C* take(View<const C> rows, Index columns, C* to) const {
    copy(rows, columns, to);
    return to;
  }
  void copy(View<const C> rows, Index columns, C* to) const {
    pack<C, C>(columns, m, rows.transposed(), to, row, padded());
  }
  void give(const C* from, Index columns, C* rows) const {
    pack<C, C>(m, columns, {from, 1, row}, rows, columns, columns);
  }

  template <class F>
  void each(Index columns, const F& body) const {
    if (padded() == row) return body(0, columns * row);
    for (Index i = 0; i < columns; ++i) body(i * row, padded());
  }

  void apply(const Layer& l, const LayerWeights<C, C>& p, Index, const C* x, C* y) const {
    const View<const C> init = p.bias ? View<const C>{p.bias, 1, 0} : View<const C>{};
    multiply_lanes(l.out, l.in, {p.matrix, l.in, 1}, x, init, y);
  }

  // As Few has it; with `add`, g is what is added to.
  void differentiate(const Layer& l, const C* w, const C* grad, const C* x, C* g, C* next,
                     bool add) const {
    if (next) multiply_lanes(l.in, l.out, {w, 1, l.in}, grad, {}, next);
    if (!g) return;
    const View<C> to{g, l.in, 1};
    // Lanes along the inputs would be partly empty, unless there are too few rows for lanes along
    // them: each entry of g is a sum over lanes then.
    if (l.in < lanes<C> && m >= 8 * width<C>)
      dot_tiles<C>(l.out, l.in, m, {grad, row, 1}, {x, row, 1}, add, to);
    else
      multiply<C, C>(l.out, l.in, m, {grad, row, 1}, View<const C>{x, 1, row},
                     add ? View<const C>{g, l.in, 1} : View<const C>{}, to);
    for (Index o = 0; l.own_bias() && o < l.out; ++o) {
      C& s = g[l.out * l.in + o];
      s = (add ? s : 0) + sum_of(grad + o * row, m);
    }
  }

 private:
  // Whole vectors, which are all computed.
  Index padded() const { return round_up(m, width<C>); }

  // y (n, m) = init + w (n, depth) x (depth, m), as deep at a time as x stays in the first-level
  // cache (24 of 32 KiB).
  void multiply_lanes(Index n, Index depth, View<const C> w, const C* x, View<const C> init,
                      C* y) const {
    constexpr Index most = (24 << 10) / (Index(sizeof(C)) * lanes<C>);
    const Index step = ceil_div(depth, ceil_div(depth, most > depth_block ? most : depth_block));
    for (Index j = 0; j < m; j += lanes<C>) {
      const int vecs = int(ceil_div(min(lanes<C>, m - j), width<C>));
      const View<C> to{y + j, row, 1};
      for (Index k = 0; k < depth; k += step)
        sweep<C, false>(n, vecs, min(step, depth - k), w.at(0, k), x + k * row + j, row, 0,
                        k ? View<const C>{to.data, row, 1} : init, to, vecs * width<C>);
    }
  }
};

}  // namespace hyperfast::HF_ISA
