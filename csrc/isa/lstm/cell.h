// One sequence's step of an LSTM with n units, from the sums that enter its gates: layer
// normalisation, gates, cell, output; and the way back, which makes all of them again.
#pragma once

#include "hyper_lstm.h"
#include "isa/network/activate.h"
#include "isa/simd/vector.h"

namespace hyperfast::HF_ISA {

// Zero from lane `count` on.
template <class V>
static inline V first_lanes_of(V v, int count) {
  for (int i = count; i < int(sizeof v / sizeof v[0]); ++i) v[i] = 0;
  return v;
}

template <class C>
static inline Vec<C> sigmoid_of(Vec<C> x) {
  return activation<Act::sigmoid>(x, C(0)).value;
}
template <class C>
static inline Vec<C> tanh_of(Vec<C> x) {
  return activation<Act::tanh>(x, C(0)).value;
}

// What a layer normalisation of n numbers subtracts, and multiplies with.
template <class C>
struct Moments {
  C mean = 0, rstd = 1;

  Moments() = default;
  Moments(Index n, const C* y) {
    Vec<C> total{}, squares{};
    each_vector<C>(n, [&](Index i, int count) { total += get(y + i, count); });
    mean = sum<C>(total) / C(n);
    each_vector<C>(n, [&](Index i, int count) {
      const Vec<C> off = first_lanes_of(get(y + i, count) - mean, count);
      squares += off * off;
    });
    rstd = 1 / C(::sqrt(sum<C>(squares) / C(n) + C(1e-5)));
  }

  Vec<C> unit(Vec<C> y) const { return (y - mean) * rstd; }
};

// dy = the gradient of y by that of its unit; dy may be `grad`, and y.
template <class C>
static void normalize_back(Index n, const Moments<C>& by, const C* y, const C* grad, C* dy) {
  Vec<C> sums{}, along{};
  each_vector<C>(n, [&](Index i, int count) {
    const Vec<C> g = get(grad + i, count);  // zero beyond
    sums += g;
    along += g * by.unit(get(y + i, count));
  });
  const C mean = sum<C>(sums) / C(n), slope = sum<C>(along) / C(n);
  each_vector<C>(n, [&](Index i, int count) {
    const Vec<C> unit = by.unit(get(y + i, count));
    put<C>(dy + i, (get(grad + i, count) - mean - unit * slope) * by.rstd, count);
  });
}

template <class C>
struct LstmCell {
  Index n;
  LstmNorm<const C> norm;

  // `gates` (4, n) of the sums y (4, n).
  void open(const C* y, Moments<C> (&moments)[4], C* gates) const {
    for (int gate = 0; gate < 4; ++gate) {
      const Index at = gate * n;
      if (norm.scale) moments[gate] = Moments<C>(n, y + at);
      each_vector<C>(n, [&](Index i, int count) {
        Vec<C> v = get(y + at + i, count);
        if (norm.scale)
          v = moments[gate].unit(v) * get(norm.scale + at + i, count) +
              get(norm.shift + at + i, count);
        put<C>(gates + at + i, gate == 2 ? tanh_of<C>(v) : sigmoid_of<C>(v), count);
      });
    }
  }

  // What the output gate multiplies: tanh of the normalised cell.
  Vec<C> shown(const Moments<C>& by, Vec<C> c, Index i, int count) const {
    if (norm.scale) c = by.unit(c) * get(norm.c_scale + i, count) + get(norm.c_shift + i, count);
    return tanh_of<C>(c);
  }

  // The next c and h; c may be `before`. `gates`: space for 4 n.
  void step(const C* y, const C* keep, const C* before, C* gates, C* c, C* h) const {
    Moments<C> moments[4], of_c;
    open(y, moments, gates);
    each_vector<C>(n, [&](Index i, int count) {
      Vec<C> g = get(gates + 2 * n + i, count);
      if (keep) g *= get(keep + i, count);
      const Vec<C> f = get(gates + n + i, count);
      put<C>(c + i, f * get(before + i, count) + get(gates + i, count) * g, count);
    });
    if (norm.scale) of_c = Moments<C>(n, c);
    each_vector<C>(n, [&](Index i, int count) {
      const Vec<C> o = get(gates + 3 * n + i, count);
      put<C>(h + i, o * shown(of_c, get(c + i, count), i, count), count);
    });
  }

  // The gradient dy (4, n) of y, which may replace y, by those of h and of c. That of `before`
  // replaces the latter; those of the normalisation are added to `sums`. `space`: for 6 n.
  void back(const C* y, const C* keep, const C* before, const C* c, const C* dh, C* dc, C* space,
            LstmNorm<C> sums, C* dy) const {
    Moments<C> moments[4], of_c;
    C *const gates = space, *const seen = space + 4 * n, *const dshown = space + 5 * n;
    open(y, moments, gates);
    if (norm.scale) of_c = Moments<C>(n, c);
    each_vector<C>(n, [&](Index i, int count) {
      const Vec<C> cell = get(c + i, count), s = shown(of_c, cell, i, count);
      Vec<C> g = get(dh + i, count) * get(gates + 3 * n + i, count) * (C(1) - s * s);
      put<C>(seen + i, s, count);
      if (norm.scale) {
        add(sums.c_scale + i, g * of_c.unit(cell), count);
        add(sums.c_shift + i, g, count);
        g *= get(norm.c_scale + i, count);
      }
      put<C>(dshown + i, g, count);
    });
    if (norm.scale) normalize_back(n, of_c, c, dshown, dshown);
    each_vector<C>(n, [&](Index i, int count) {
      const auto gate = [&](int k) { return gates + k * n + i; };
      const Vec<C> in = get(gate(0), count), f = get(gate(1), count), g = get(gate(2), count),
                   o = get(gate(3), count), gh = get(dh + i, count),
                   gc = get(dc + i, count) + get(dshown + i, count);
      const Vec<C> kept = keep ? gc * get(keep + i, count) : gc;
      put<C>(gate(0), kept * g * (in * (C(1) - in)), count);
      put<C>(gate(1), gc * get(before + i, count) * (f * (C(1) - f)), count);
      put<C>(gate(2), kept * in * (C(1) - g * g), count);
      put<C>(gate(3), gh * get(seen + i, count) * (o * (C(1) - o)), count);
      put<C>(dc + i, gc * f, count);
    });
    for (int k = 0; k < 4; ++k) {
      const Index at = k * n;
      C *const grad = gates + at, *const to = dy + at;
      if (!norm.scale) {
        each_vector<C>(n, [&](Index i, int count) { put<C>(to + i, get(grad + i, count), count); });
        continue;
      }
      each_vector<C>(n, [&](Index i, int count) {
        const Vec<C> g = get(grad + i, count);
        add(sums.scale + at + i, g * moments[k].unit(get(y + at + i, count)), count);
        add(sums.shift + at + i, g, count);
        put<C>(grad + i, g * get(norm.scale + at + i, count), count);
      });
      normalize_back(n, moments[k], y + at, grad, to);
    }
  }

 private:
  static void add(C* to, Vec<C> v, int count) { put<C>(to, get(to, count) + v, count); }
};

}  // namespace hyperfast::HF_ISA
