// Activations of many numbers.
#pragma once

#include "isa/simd/stretch.h"

namespace hyperfast::HF_ISA {

template <Act kind>
static inline ValueAndSlope<Vec<double>> activation(Vec<double> x, double parameter) {
  ValueAndSlope<Vec<double>> all;
  for (int i = 0; i < width<double>; ++i) {
    const auto one = Formula<kind>::of(double(x[i]), parameter);
    all.value[i] = one.value;
    all.slope[i] = one.slope;
  }
  return all;
}
template <Act kind>
static inline ValueAndSlope<VecF> activation(VecF x, float parameter) {
  return Formula<kind>::of(x, parameter);
}

template <class F>
static inline void with_activation(Act kind, const F& body) {
  switch (kind) {
#define HF_CASE(name, parameter) \
  case Act::name: return body(std::integral_constant<Act, Act::name>{});
    HF_CASE(identity, none)
    HF_ACTIVATIONS(HF_CASE)
#undef HF_CASE
  }
}

// a = f(pre) for n elements; a may be pre.
template <class T>
static void activate(const Layer& layer, Index n, const T* pre, T* a) {
  using C = Acc<T>;
  if (layer.act == Act::identity && pre == a) return;
  with_activation(layer.act, [&](auto kind) {
    each_vector<T>(n, [&](Index i, int count) {
      put<T>(a + i,
             activation<decltype(kind)::value>(get(pre + i, count), C(layer.parameter)).value,
             count);
    });
  });
}

// g *= f'(pre), and where a is not null a = f(pre), for n elements.
template <class T>
static void slope(const Layer& layer, Index n, const T* pre, T* g, T* a) {
  using C = Acc<T>;
  with_activation(layer.act, [&](auto kind) {
    each_vector<T>(n, [&](Index i, int count) {
      const ValueAndSlope<Vec<C>> both =
          activation<decltype(kind)::value>(get(pre + i, count), C(layer.parameter));
      if (a) put<T>(a + i, both.value, count);
      put<T>(g + i, get(g + i, count) * both.slope, count);
    });
  });
}

// pre becomes f(pre), and s f'(pre), for n elements.
template <class C>
static void activate_and_slope(const Layer& layer, Index n, C* pre, C* s) {
  with_activation(layer.act, [&](auto kind) {
    each_vector<C>(n, [&](Index i, int count) {
      const ValueAndSlope<Vec<C>> both =
          activation<decltype(kind)::value>(get(pre + i, count), C(layer.parameter));
      put<C>(pre + i, both.value, count);
      put<C>(s + i, both.slope, count);
    });
  });
}

// y = a b, for n elements; y may be either.
template <class C>
static void multiply_each(Index n, const C* a, const C* b, C* y) {
  each_vector<C>(
      n, [&](Index i, int count) { put<C>(y + i, get(a + i, count) * get(b + i, count), count); });
}

}  // namespace hyperfast::HF_ISA
