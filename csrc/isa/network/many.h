// Many rows of a network with lanes along them: a layer's values are (columns, rows), so that
// narrow layers fill vectors too, and weights are read as they lie, one entry for a vector of rows.
#pragma once

#include "isa/network/lanes.h"
#include "isa/network/weights.h"
#include "isa/product/sums.h"
#include "isa/rows/staged.h"

namespace hyperfast::HF_ISA {

template <class C>
struct Many {
  Index m;
  Index row;     // elements from a column's values to the next one's
  Ahead* ahead;  // what products fetch on their way

  Many(Index m, Ahead& ahead) : m(m), row(odd_lines<C>(m)), ahead(&ahead) {}

  Index size(Index columns) const { return row * columns; }

  const C* take(View<const C> rows, Index columns, C* to) const {
    copy(rows, columns, to);
    return to;
  }
  void copy(View<const C> rows, Index columns, C* to) const {
    pack<C, C>(columns, m, rows.transposed(), to, row, padded());
  }
  // Rows of pairs, as a product in pairs takes them.
  const C* take_pairs(View<const C> rows, Index columns, C* to) const {
    copy(rows, ceil_div(columns, 2), to);
    return to;
  }
  // The same as floats: half as much is turned around, and what it comes from widened on the way.
  const C* take_apart(View<const C> rows, Index columns, C* to) const {
    return apart(take_pairs(rows, columns, to + columns / 2 * row), columns, to);
  }
  const C* apart(const C* pairs, Index columns, C* to) const {
    part_rows(columns, padded(), row, pairs, to);
    return to;
  }
  void give(const C* from, Index columns, C* rows) const {
    if (columns == 1)
      pack<C, C>(1, m, {from, row, 1}, rows, m, m);
    else
      pack<C, C>(m, columns, {from, 1, row}, rows, columns, columns);
  }

  // To rows of bf16 of so many pairs: half as much is turned around.
  void give_pairs(const C* from, Index pairs, C* rows) const {
    C* const narrow = scratch<C>(Slot::local_a, size(pairs));
    join_rows(2 * pairs, padded(), row, from, narrow);
    give(narrow, pairs, rows);
  }

  // y = W x + c.
  void apply(const Layer& l, const LayerWeights<C, C>& p, Index, const C* x, C* y) const {
    multiply_layer(l, p, x, y, Stored<C>{y, row});
  }
  // y becomes f(y), and the slopes are stored where they are not null.
  void activate(const Layer& l, C* y, C* slopes) const {
    each(l.out, [&](Index at, Index count) {
      if (slopes)
        activate_and_slope<C>(l, count, y + at, slopes + at);
      else
        HF_ISA::activate<C>(l, count, y + at, y + at);
    });
  }
  // Both. What takes few operations is done in the registers of the product: with others it would
  // be the same code for each shape of a tile, and no faster than a pass of its own.
  void apply_activated(const Layer& l, const LayerWeights<C, C>& p, Index ahead, const C* x, C* y,
                       C* slopes) const {
    if constexpr (std::is_same_v<C, float>) {
      if (l.act == Act::relu) return in_registers<Act::relu>(l, p, x, y, slopes);
      if (l.act == Act::sin) return in_registers<Act::sin>(l, p, x, y, slopes);
    }
    apply(l, p, ahead, x, y);
    activate(l, y, slopes);
  }

  // As Few has it; with `add`, g is what is added to.
  void differentiate(const Layer& l, const C* w, const C* grad, const C* x, C* g, C* next,
                     const C* slopes, bool add) const {
    const LaneProduct<C> back{l.in, m, l.out, {w, 1, l.in}, nullptr, grad, row, next, row, ahead};
    if (next && slopes) multiply_lanes(back, TimesSlopes<C>{{next, row}, slopes});
    if (next && !slopes) multiply_lanes(back, Stored<C>{next, row});
    if (!g) return;
    const View<C> to{g, l.in, 1};
    const DotShape shape = DotShape::of<C>(l.out, l.in);
    if (shape.pays<C>(l.out, l.in, m))
      dot_tiles<C>(shape, l.out, l.in, m, {grad, row, 1}, {x, row, 1}, add, to);
    else
      multiply<C, C>(l.out, l.in, m, {grad, row, 1}, View<const C>{x, 1, row},
                     add ? View<const C>{g, l.in, 1} : View<const C>{}, to);
    if (l.own_bias()) row_sums<C>(l.out, m, {grad, row, 1}, add, g + l.out * l.in);
  }

  // y = a b; y may be either.
  void times(Index columns, const C* a, const C* b, C* y) const {
    each(columns, [&](Index at, Index count) { multiply_each<C>(count, a + at, b + at, y + at); });
  }

 private:
  // Whole vectors, which are all computed.
  Index padded() const { return round_up(m, width<C>); }

  // Calls body(at, count) for the elements of so many columns.
  template <class F>
  void each(Index columns, const F& body) const {
    if (padded() == row) return body(0, columns * row);
    for (Index i = 0; i < columns; ++i) body(i * row, padded());
  }

  template <class F>
  void multiply_layer(const Layer& l, const LayerWeights<C, C>& p, const C* x, C* y,
                      const F& finish) const {
    const auto by = [&](auto* w) {
      using W = std::remove_const_t<std::remove_pointer_t<decltype(w)>>;
      const LaneProduct<C, W> all{l.out, m, l.in, {w, l.in, 1}, p.bias, x, row, y, row, ahead};
      multiply_lanes(all, finish);
    };
    if constexpr (has_pair_dot && std::is_same_v<C, float>)
      if (p.pairs) return by(p.pairs);
    by(p.matrix);
  }

  template <Act kind>
  void in_registers(const Layer& l, const LayerWeights<C, C>& p, const C* x, C* y,
                    C* slopes) const {
    if (slopes)
      multiply_layer(l, p, x, y, Activated<kind, true>{{y, row}, l, slopes});
    else
      multiply_layer(l, p, x, y, Activated<kind, false>{{y, row}, l, nullptr});
  }
};

}  // namespace hyperfast::HF_ISA
