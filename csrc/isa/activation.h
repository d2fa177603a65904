// Activations and their slopes. In float: polynomials after range reduction, within 3 units in the last
// place (tests/test_cpp_mlp.py); the coefficients are those of Moshier's Cephes library. In double: the C
// library's functions.
#pragma once

#include <cmath>

#include "vec.h"

namespace hyperfast::HF_ISA {

using VecF = Vec<float>;
typedef std::int32_t VecI __attribute__((vector_size(HF_VECTOR_BYTES)));

static inline VecF bits_to_float(VecI v) { return bit_cast<VecF>(v); }
static inline VecF all(float v) { return v - VecF{}; }
static inline VecF select(VecI mask, VecF yes, VecF no) { return mask ? yes : no; }
static inline VecF magnitude(VecF x) { return bits_to_float(bit_cast<VecI>(x) & 0x7fffffff); }

static inline bool any(VecI mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(__m512i(mask), __m512i(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8(__m256i(mask)) != 0;
#endif
  std::int32_t found = 0;
  for (int i = 0; i < width<float>; ++i) found |= mask[i];
  return found != 0;
}

// To the nearest integer, |x| < 2^22: `steps` are its bits, `rounded` its value.
struct Rounded {
  VecI steps;
  VecF rounded;

  explicit Rounded(VecF x) {
    constexpr float magic = 0x1.8p23f;  // its unit in the last place is 1
    const VecF shifted = x + magic;
    steps = bit_cast<VecI>(shifted) - bit_cast<std::int32_t>(magic);
    rounded = shifted - magic;
  }
};

// e^x = 2^n (1 + tail) with |r| <= ln(2) / 2.
struct Exponential {
  VecI n;
  VecF tail;

  explicit Exponential(VecF x) {
    x = select(x > 89.f, all(89), x);  // beyond: infinity, and 0
    x = select(x < -104.f, all(-104), x);
    const Rounded k(x * 1.44269504088896341f);
    n = k.steps;
    const VecF r = x - k.rounded * 0.693359375f - k.rounded * -2.12194440e-4f;
    VecF p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    tail = p * r * r + r;
  }

  VecF value() const {  // in two steps, as 2^n alone may overflow or be subnormal
    const VecI half = n >> 1;
    return (tail + 1.f) * bits_to_float((half + 127) << 23) * bits_to_float((n - half + 127) << 23);
  }
  VecF minus_one() const { return select(n == 0, tail, value() - 1.f); }
};

// Sine and cosine, |x| <= 8192: pi / 2 in parts whose products with n are exact.
struct SineCosine {
  static constexpr float most = 8192;
  VecF sine, cosine;

  explicit SineCosine(VecF x) {
    const Rounded k(x * 0.636619772367581343f);
    const VecF r = ((x - k.rounded * 1.5703125f) - k.rounded * 4.837512969970703125e-4f) -
                   k.rounded * 7.54978995489188216e-8f;
    const VecF r2 = r * r;
    const VecF s =
        ((-1.9515295891e-4f * r2 + 8.3321608736e-3f) * r2 - 1.6666654611e-1f) * r2 * r + r;
    const VecF c =
        ((2.443315711809948e-5f * r2 - 1.388731625493765e-3f) * r2 + 4.166664568298827e-2f) * r2 * r2 -
        0.5f * r2 + 1.f;
    const VecI odd = -(k.steps & 1), down = (k.steps & 2) << 30, left = ((k.steps + 1) & 2) << 30;
    sine = bits_to_float(bit_cast<VecI>(select(odd, c, s)) ^ down);
    cosine = bits_to_float(bit_cast<VecI>(select(odd, s, c)) ^ left);
  }
};

static inline VecF sigmoid(VecF x) { return 1.f / (1.f + Exponential(-x).value()); }

static inline VecF tanh(VecF x) {
  const VecF size = magnitude(x);
  const VecF far = 1.f - 2.f / (Exponential(2.f * size).value() + 1.f);
  const VecF x2 = x * x;
  VecF p = -5.70498872745e-3f * x2 + 2.06390887954e-2f;
  p = p * x2 - 5.37397155531e-2f;
  p = p * x2 + 1.33314422036e-1f;
  p = p * x2 - 3.33332819422e-1f;
  const VecI sign = bit_cast<VecI>(x) & std::int32_t(0x80000000);
  return select(size < 0.625f, p * x2 * x + x, bits_to_float(bit_cast<VecI>(far) | sign));
}

// What a layer's kernel asks of an activation: value and slope of one vector.
template <class C>
struct Both {
  Vec<C> value, slope;
};

template <class F>
static inline VecF each(VecF x, const F& f) {
  for (int i = 0; i < width<float>; ++i) x[i] = f(x[i]);
  return x;
}

template <Act kind>
static inline Both<float> activation(VecF x, float parameter) {
  const VecF zero{}, one = all(1);
  if constexpr (kind == Act::relu) {
    return {select(x <= 0.f, zero, x), select(x <= 0.f, zero, one)};  // NaN passes, as in PyTorch
  } else if constexpr (kind == Act::leaky_relu) {
    return {select(x > 0.f, x, x * parameter), select(x > 0.f, one, all(parameter))};
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
static inline Both<double> activation(Vec<double> x, double parameter) {
  Both<double> both;
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

// a = f(z) for n elements; a may be z.
template <class T>
static void activate(const Layer& layer, Index n, const T* z, T* a) {
  using C = Acc<T>;
  if (layer.act == Act::identity && z == a) return;
  with_activation(layer.act, [&](auto kind) {
    each_vector<T>(n, [&](Index i, int count) {
      put<T>(a + i, activation<decltype(kind)::value>(get(z + i, count), C(layer.parameter)).value, count);
    });
  });
}

// g *= f'(z), and where a is not null a = f(z), for n elements.
template <class T>
static void slope(const Layer& layer, Index n, const T* z, T* g, T* a) {
  using C = Acc<T>;
  with_activation(layer.act, [&](auto kind) {
    each_vector<T>(n, [&](Index i, int count) {
      const Both<C> both = activation<decltype(kind)::value>(get(z + i, count), C(layer.parameter));
      if (a) put<T>(a + i, both.value, count);
      put<T>(g + i, get(g + i, count) * both.slope, count);
    });
  });
}

}  // namespace hyperfast::HF_ISA
