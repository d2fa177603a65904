// Activations and their slopes. In float: simd/math.h; in double: the C library's functions.
#pragma once

#include <cmath>

#include "isa/simd/math.h"
#include "kernels.h"

namespace hyperfast::HF_ISA {

// What a layer's kernel asks of an activation: value and slope of one vector.
template <class C>
struct ValueAndSlope {
  Vec<C> value, slope;
};

template <class F>
static inline VecF each(VecF x, const F& f) {
  for (int i = 0; i < width<float>; ++i) x[i] = f(x[i]);
  return x;
}

template <Act kind>
static inline ValueAndSlope<float> activation(VecF x, float parameter) {
  const VecF zero{}, one = broadcast(1);
  if constexpr (kind == Act::relu) {
    return {select(x <= 0.f, zero, x), select(x <= 0.f, zero, one)};  // NaN passes, as in PyTorch
  } else if constexpr (kind == Act::leaky_relu) {
    return {select(x > 0.f, x, x * parameter), select(x > 0.f, one, broadcast(parameter))};
  } else if constexpr (kind == Act::elu) {
    const Exponential e(select(x > 0.f, zero, x));
    return {select(x > 0.f, x, e.minus_one()), e.value()};
  } else if constexpr (kind == Act::sigmoid) {
    const VecF s = sigmoid(x);
    return {s, s * (1.f - s)};
  } else if constexpr (kind == Act::silu) {
    const VecF s = sigmoid(x);
    return {x * s, s * (1.f + x * (1.f - s))};
  } else if constexpr (kind == Act::sin) {
    const VecF w = x * parameter;
    const VecI near = magnitude(w) <= SineCosine::most;
    if (any(~near))
      return {each(w, [](float v) { return float(::sin(double(v))); }),
              each(w, [](float v) { return float(::cos(double(v))); }) * parameter};
    const SineCosine both(w);
    return {both.sine, both.cosine * parameter};
  } else if constexpr (kind == Act::tanh) {
    const VecF t = tanh(x);
    return {t, 1.f - t * t};
  } else {
    return {x, one};
  }
}

template <Act kind>
static inline ValueAndSlope<double> activation(Vec<double> x, double parameter) {
  ValueAndSlope<double> both;
  for (int i = 0; i < width<double>; ++i) {
    const double v = x[i];
    double f = v, d = 1;
    if constexpr (kind == Act::relu) {
      f = v <= 0 ? 0 : v;
      d = !(v <= 0);
    } else if constexpr (kind == Act::leaky_relu) {
      f = v > 0 ? v : v * parameter;
      d = v > 0 ? 1 : parameter;
    } else if constexpr (kind == Act::elu) {
      f = v > 0 ? v : ::expm1(v);
      d = v > 0 ? 1 : ::exp(v);
    } else if constexpr (kind == Act::sigmoid) {
      f = 1 / (1 + ::exp(-v));
      d = f * (1 - f);
    } else if constexpr (kind == Act::silu) {
      const double s = 1 / (1 + ::exp(-v));
      f = v * s;
      d = s * (1 + v * (1 - s));
    } else if constexpr (kind == Act::sin) {
      f = ::sin(v * parameter);
      d = ::cos(v * parameter) * parameter;
    } else if constexpr (kind == Act::tanh) {
      f = ::tanh(v);
      d = 1 - f * f;
    }
    both.value[i] = f;
    both.slope[i] = d;
  }
  return both;
}

template <class F>
static inline void with_activation(Act kind, const F& body) {
  switch (kind) {
    case Act::identity: return body(std::integral_constant<Act, Act::identity>{});
    case Act::relu: return body(std::integral_constant<Act, Act::relu>{});
    case Act::leaky_relu: return body(std::integral_constant<Act, Act::leaky_relu>{});
    case Act::elu: return body(std::integral_constant<Act, Act::elu>{});
    case Act::sigmoid: return body(std::integral_constant<Act, Act::sigmoid>{});
    case Act::silu: return body(std::integral_constant<Act, Act::silu>{});
    case Act::sin: return body(std::integral_constant<Act, Act::sin>{});
    case Act::tanh: return body(std::integral_constant<Act, Act::tanh>{});
  }
}

// Calls body(first, count) for each vector of n elements; the last may be a part.
template <class T, class F>
static inline void each_vector(Index n, const F& body) {
  constexpr int w = width<Acc<T>>;
  Index i = 0;
  for (; i + w <= n; i += w) body(i, w);
  if (i < n) body(i, int(n - i));
}

template <class T>
static inline Vec<Acc<T>> get(const T* p, int count) {
  if (count == width<Acc<T>>) return load_wide(p);
  Vec<Acc<T>> v{};
  for (int i = 0; i < count; ++i) v[i] = widen(p[i]);
  return v;
}

template <class T>
static inline void put(T* p, Vec<Acc<T>> v, int count) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    if (count == width<T>) return store(p, v);
  }
  for (int i = 0; i < count; ++i) p[i] = narrow<T>(v[i]);
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
      const ValueAndSlope<C> both =
          activation<decltype(kind)::value>(get(pre + i, count), C(layer.parameter));
      if (a) put<T>(a + i, both.value, count);
      put<T>(g + i, get(g + i, count) * both.slope, count);
    });
  });
}

}  // namespace hyperfast::HF_ISA
