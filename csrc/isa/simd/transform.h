// Transforms of weights: value and slope of each, and of many weights at once. A new one is a name
// in kernels.h, a formula and a case.
#pragma once

#include "isa/simd/stretch.h"

namespace hyperfast::HF_ISA {

template <Transform>
struct Transformed;

template <>
struct Transformed<Transform::abs> {
  static Floats of(VecF w) {
    const VecF up = select(w > 0.f, broadcast(1), VecF{});
    return {magnitude(w), select(w < 0.f, broadcast(-1), up)};
  }
  static Double of(double w) { return {::fabs(w), double((w > 0) - (w < 0))}; }
};

template <>
struct Transformed<Transform::softplus> : Formula<Act::softplus> {
  static Floats of(VecF w) { return Formula::of(w, 0); }
  static Double of(double w) { return Formula::of(w, 0); }
};

template <>
struct Transformed<Transform::exp> {
  static Floats of(VecF w) {
    const VecF e = Exponential(w).value();
    return {e, e};
  }
  static Double of(double w) {
    const double e = ::exp(w);
    return {e, e};
  }
};

template <>
struct Transformed<Transform::square> {
  static Floats of(VecF w) { return {w * w, w + w}; }
  static Double of(double w) { return {w * w, w + w}; }
};

template <Transform kind>
static inline Floats transformed(VecF w) {
  return Transformed<kind>::of(w);
}
template <Transform kind>
static inline ValueAndSlope<Vec<double>> transformed(Vec<double> w) {
  ValueAndSlope<Vec<double>> all;
  for (int i = 0; i < width<double>; ++i) {
    const Double one = Transformed<kind>::of(w[i]);
    all.value[i] = one.value;
    all.slope[i] = one.slope;
  }
  return all;
}

// Calls body(integral_constant of the transform), unless there is none.
template <class F>
static inline void with_transform(Transform kind, const F& body) {
  switch (kind) {
    case Transform::none: return;
#define HF_CASE(name) \
  case Transform::name: return body(std::integral_constant<Transform, Transform::name>{});
      HF_CASE(abs)
      HF_CASE(softplus)
      HF_CASE(exp)
      HF_CASE(square)
#undef HF_CASE
  }
}

// w = f(w) for n weights.
template <class C>
static void transform(Transform kind, Index n, C* w) {
  with_transform(kind, [&](auto f) {
    each_vector<C>(n, [&](Index i, int count) {
      put<C>(w + i, transformed<decltype(f)::value>(get(w + i, count)).value, count);
    });
  });
}

// g *= f'(w) for the gradients of n weights f(w).
template <class C>
static void transform_slope(Transform kind, Index n, const C* w, C* g) {
  with_transform(kind, [&](auto f) {
    each_vector<C>(n, [&](Index i, int count) {
      put<C>(g + i, get(g + i, count) * transformed<decltype(f)::value>(get(w + i, count)).slope,
             count);
    });
  });
}

}  // namespace hyperfast::HF_ISA
