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

// What a layer normalisation subtracts, and multiplies with.
template <class C>
struct Moments {
  C mean = 0, rstd = 1;

  Vec<C> unit(Vec<C> y) const { return (y - mean) * rstd; }
};

// Of n numbers each. All at once, as here and below, since every sum waits for its last term.
template <int N, class C>
static void measure(Index n, const C* const (&y)[N], Moments<C> (&moments)[N]) {
  Vec<C> total[N]{}, squares[N]{};
  each_vector<C>(n, [&](Index i, int count) {
#pragma GCC unroll 5
    for (int k = 0; k < N; ++k) total[k] += get(y[k] + i, count);
  });
  for (int k = 0; k < N; ++k) moments[k].mean = sum<C>(total[k]) / C(n);
  each_vector<C>(n, [&](Index i, int count) {
#pragma GCC unroll 5
    for (int k = 0; k < N; ++k) {
      const Vec<C> off = first_lanes_of(get(y[k] + i, count) - moments[k].mean, count);
      squares[k] += off * off;
    }
  });
  for (int k = 0; k < N; ++k) moments[k].rstd = 1 / C(::sqrt(sum<C>(squares[k]) / C(n) + C(1e-5)));
}

// The way back through a layer normalisation of n numbers y, from gradients of their units.
template <class C>
struct BackSums {
  Vec<C> grads{}, along{};

  void add(Vec<C> grad, Vec<C> unit) { grads += grad, along += grad * unit; }
};
template <class C>
struct NormalizeBack {
  Moments<C> by;
  C mean, slope;

  NormalizeBack(Index n, const Moments<C>& by, const BackSums<C>& sums)
      : by(by), mean(sum<C>(sums.grads) / C(n)), slope(sum<C>(sums.along) / C(n)) {}
  Vec<C> of(Vec<C> grad, Vec<C> y) const { return (grad - mean - by.unit(y) * slope) * by.rstd; }
};

template <class C>
struct LstmCell {
  Index n;
  LstmNorm<const C> norm;

  // The next c and h, from the sums y (4, n) that enter the gates; c may be `before`. `space`: for
  // n.
  void step(const C* y, const C* keep, const C* before, C* space, C* c, C* h) const {
    Moments<C> moments[4], of_c[1];
    if (norm.scale) measure<4>(n, {y, y + n, y + 2 * n, y + 3 * n}, moments);
    each_vector<C>(n, [&](Index i, int count) {
      const Gates gate = open(moments, y, i, count);
      const Vec<C> g = keep ? gate.g * get(keep + i, count) : gate.g;
      put<C>(c + i, gate.f * get(before + i, count) + gate.i * g, count);
      put<C>(space + i, gate.o, count);
    });
    if (norm.scale) measure<1>(n, {c}, of_c);
    each_vector<C>(n, [&](Index i, int count) {
      put<C>(h + i, get(space + i, count) * shown(of_c[0], get(c + i, count), i, count), count);
    });
  }

  // The gradient dy (4, n) of y, which may replace y, by those of h and of c. That of `before`
  // replaces the latter; those of the normalisation are added to `sums`. `space`: for 5 n.
  void back(const C* y, const C* keep, const C* before, const C* c, const C* dh, C* dc, C* space,
            LstmNorm<C> sums, C* dy) const {
    Moments<C> moments[5];  // the last is of c
    if (norm.scale) measure<5>(n, {y, y + n, y + 2 * n, y + 3 * n, c}, moments);
    C* const dshown = space + 4 * n;
    BackSums<C> of_c;
    // Inlined, which so large a body otherwise is not: the way back of a cell took 5 to 15% longer.
    each_vector<C>(n, [&](Index i, int count) __attribute__((always_inline)) {
      const Gates gate = open(moments, y, i, count);
      const Vec<C> cell = get(c + i, count), s = shown(moments[4], cell, i, count),
                   gh = get(dh + i, count);
      Vec<C> g = gh * gate.o * (C(1) - s * s);
      if (norm.scale) {
        const Vec<C> unit = moments[4].unit(cell);
        add(sums.c_scale + i, g * unit, count);
        add(sums.c_shift + i, g, count);
        g *= get(norm.c_scale + i, count);  // zero beyond
        of_c.add(g, unit);
      }
      put<C>(dshown + i, g, count);
      put<C>(space + i, gate.i, count);
      put<C>(space + n + i, gate.f, count);
      put<C>(space + 2 * n + i, gate.g, count);
      put<C>(space + 3 * n + i, gh * s * (gate.o * (C(1) - gate.o)), count);
    });
    const NormalizeBack<C> back_c(n, moments[4], of_c);
    BackSums<C> of_y[4];
    each_vector<C>(n, [&](Index i, int count) __attribute__((always_inline)) {
      const auto at = [&](int k) { return get(space + k * n + i, count); };
      const Vec<C> in = at(0), f = at(1), g = at(2), of_shown = at(4);
      const Vec<C> gc =
          get(dc + i, count) + (norm.scale ? back_c.of(of_shown, get(c + i, count)) : of_shown);
      const Vec<C> kept = keep ? gc * get(keep + i, count) : gc;
      put<C>(dc + i, gc * f, count);
      const Vec<C> grads[] = {kept * g * (in * (C(1) - in)),
                              gc * get(before + i, count) * (f * (C(1) - f)),
                              kept * in * (C(1) - g * g), at(3)};
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const Index j = k * n + i;
        Vec<C> grad = grads[k];
        if (!norm.scale) {
          put<C>(dy + j, grad, count);
          continue;
        }
        const Vec<C> unit = moments[k].unit(get(y + j, count));
        add(sums.scale + j, grad * unit, count);
        add(sums.shift + j, grad, count);
        grad *= get(norm.scale + j, count);  // zero beyond
        of_y[k].add(grad, unit);
        put<C>(space + j, grad, count);
      }
    });
    for (int k = 0; norm.scale && k < 4; ++k) {
      const NormalizeBack<C> back_y(n, moments[k], of_y[k]);
      each_vector<C>(n, [&](Index i, int count) {
        const Index j = k * n + i;
        put<C>(dy + j, back_y.of(get(space + j, count), get(y + j, count)), count);
      });
    }
  }

 private:
  struct Gates {
    Vec<C> i, f, g, o;
  };

  Gates open(const Moments<C>* moments, const C* y, Index i, int count) const {
    const auto normed = [&](int k) {
      const Index j = k * n + i;
      const Vec<C> v = get(y + j, count);
      if (!norm.scale) return v;
      return moments[k].unit(v) * get(norm.scale + j, count) + get(norm.shift + j, count);
    };
    return {sigmoid_of<C>(normed(0)), sigmoid_of<C>(normed(1)), tanh_of<C>(normed(2)),
            sigmoid_of<C>(normed(3))};
  }

  // What the output gate multiplies: tanh of the normalised cell.
  Vec<C> shown(const Moments<C>& by, Vec<C> c, Index i, int count) const {
    if (norm.scale) c = by.unit(c) * get(norm.c_scale + i, count) + get(norm.c_shift + i, count);
    return tanh_of<C>(c);
  }

  static void add(C* to, Vec<C> v, int count) { put<C>(to, get(to, count) + v, count); }
};

}  // namespace hyperfast::HF_ISA
