// Few rows of a network, one behind another: weights are read as they lie, and once.
#pragma once

#include "isa/network/activate.h"
#include "isa/network/weights.h"
#include "isa/product/dot.h"
#include "isa/rows/staged.h"

namespace hyperfast::HF_ISA {

template <class W, class C>
struct Few {
  Index m;

  Index size(Index columns) const { return m * columns; }

  // Rows as they lie, if they lie so, else a copy.
  const C* take(View<const C> rows, Index columns, C* to) const {
    if (rows.col == 1 && (m == 1 || rows.row == columns)) return rows.data;
    copy(rows, columns, to);
    return to;
  }
  void copy(View<const C> rows, Index columns, C* to) const {
    for (Index r = 0; r < m; ++r)
      for (Index i = 0; i < columns; ++i)
        to[r * columns + i] = rows.data[r * rows.row + i * rows.col];
  }
  void give(const C* from, Index columns, C* rows) const {
    for (Index j = 0; j < m * columns; ++j) rows[j] = from[j];
  }

  // y (m, out) = W x + c. `ahead` is the distance to what is read next.
  void apply(const Layer& l, const LayerWeights<W, C>& p, Index ahead, const C* x, C* y) const {
    const View<const C> init = p.scales ? View<const C>{} : View<const C>{p.bias, 1, 0};
    dots<C, W>(l.out, m, l.in, {p.matrix, l.in, 1}, x, l.in, init, {y, 1, l.out}, ahead);
    for (Index r = 0; p.scales && r < m; ++r)
      for (Index o = 0; o < l.out; ++o) {
        C& v = y[r * l.out + o];
        v = v * p.scales[o] + (p.bias ? p.bias[o] : 0);
      }
  }

  // y becomes f(y), and the slopes are stored where they are not null.
  void activate(const Layer& l, C* y, C* slopes) const {
    if (slopes)
      activate_and_slope<C>(l, m * l.out, y, slopes);
    else
      HF_ISA::activate<C>(l, m * l.out, y, y);
  }
  // Both.
  void apply_activated(const Layer& l, const LayerWeights<W, C>& p, Index ahead, const C* x, C* y,
                       C* slopes) const {
    apply(l, p, ahead, x, y);
    activate(l, y, slopes);
  }

  // From grad (m, out), the gradients: next (m, in) of x, times slopes where they are not null, and
  // g of the layer's parameters. Those that are null are not wanted. Few rows are all there are:
  // nothing is added to g.
  void differentiate(const Layer& l, const W* w, const C* grad, const C* x, C* g, C* next,
                     const C* slopes, bool) const {
    (m == 1 ? pass<1> : pass<0>)(l, m, w, grad, x, g, next);
    if (next && slopes) times(l.in, next, slopes, next);
    for (Index o = 0; g && l.own_bias() && o < l.out; ++o) {
      C s = grad[o];
      for (Index r = 1; r < m; ++r) s += grad[r * l.out + o];
      g[l.out * l.in + o] = s;
    }
  }

  // y = a b; y may be either.
  void times(Index columns, const C* a, const C* b, C* y) const {
    multiply_each<C>(m * columns, a, b, y);
  }

 private:
  // One pass over the matrix and its gradient. M: the number of rows, or 0.
  template <int M>
  static void pass(const Layer& l, Index rows, const W* w, const C* grad, const C* x, C* g,
                   C* next) {
    const Index m = M ? M : rows, in = l.in;
    constexpr int n = width<C>;
    for (Index j = 0; next && j < m * in; ++j) next[j] = 0;
    for (Index o = 0; o < l.out; ++o, w += in, g += g ? in : 0) {
      C s[few_rows];
      for (Index r = 0; r < m; ++r) s[r] = grad[r * l.out + o];
      Index i = 0;
      for (; i + n <= in; i += n) {
        if (next) {
          const Vec<C> v = load_wide(w + i);
          for (Index r = 0; r < m; ++r)
            store(next + r * in + i, load(next + r * in + i) + s[r] * v);
        }
        if (g) {
          Vec<C> sum = s[0] * load(x + i);
          for (Index r = 1; r < m; ++r) sum += s[r] * load(x + r * in + i);
          store(g + i, sum);
        }
      }
      for (; i < in; ++i) {
        for (Index r = 0; next && r < m; ++r) next[r * in + i] += s[r] * widen(w[i]);
        if (!g) continue;
        C sum = s[0] * x[i];
        for (Index r = 1; r < m; ++r) sum += s[r] * x[r * in + i];
        g[i] = sum;
      }
    }
  }
};

}  // namespace hyperfast::HF_ISA
