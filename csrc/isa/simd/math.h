// Functions of float vectors: polynomials after range reduction, within 3 units in the last place
// (tests/kernels/cpp), but for sines and cosines next to their zeros; the coefficients are those of
// Moshier's Cephes library, unless said otherwise.
#pragma once

#include "isa/simd/vector.h"

namespace hyperfast::HF_ISA {

static inline VecF bits_to_float(VecI v) { return bit_cast<VecF>(v); }
static inline VecF broadcast(float v) { return v - VecF{}; }
static inline VecF select(VecI mask, VecF yes, VecF no) { return mask ? yes : no; }
static inline VecF magnitude(VecF x) { return bits_to_float(bit_cast<VecI>(x) & 0x7fffffff); }

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

// The sum of two floats: an argument of e^x of which rounding would show, in units in the last
// place of the result as many as x is large.
struct Exact {
  VecF high, low;

  Exact minus_magnitude() const {
    return {select(high > 0.f, -high, high), select(high > 0.f, -low, low)};
  }
};

// f(x), computed in double.
template <class F>
static inline Exact exactly(VecF x, const F& f) {
  using Half = float __attribute__((vector_size(HF_VECTOR_BYTES / 2)));
  Half in[2], high[2], low[2];
  std::memcpy(in, &x, sizeof x);
  for (int i = 0; i < 2; ++i) {
    const Vec<double> y = f(__builtin_convertvector(in[i], Vec<double>));
    high[i] = __builtin_convertvector(y, Half);
    low[i] = __builtin_convertvector(y - __builtin_convertvector(high[i], Vec<double>), Half);
  }
  return {bit_cast<VecF>(high), bit_cast<VecF>(low)};
}

#ifndef __AVX512F__
// v times 2^n, n whole: in two steps, as 2^n alone may overflow or be subnormal.
static inline VecF times_power(VecF v, VecF n) {
  const VecI steps = __builtin_convertvector(n, VecI), half = steps >> 1;
  return v * bits_to_float((half + 127) << 23) * bits_to_float((steps - half + 127) << 23);
}
#endif

// e^x = 2^n (1 + tail) with |r| <= ln(2) / 2.
struct Exponential {
  VecF n, tail;

  explicit Exponential(VecF x) : Exponential(x, [](VecF r) { return r; }) {}
  explicit Exponential(Exact x) : Exponential(x.high, [=](VecF r) { return r + x.low; }) {}

  template <class F>
  Exponential(VecF x, const F& correct) {
    x = select(x > 89.f, broadcast(89), x);  // beyond: infinity, and 0
    x = select(x < -104.f, broadcast(-104), x);
    const Rounded k(x * 1.44269504088896341f);
    n = k.rounded;
    const VecF r = correct(x - k.rounded * 0.693359375f - k.rounded * -2.12194440e-4f);
    VecF p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    tail = p * r * r + r;
  }

  VecF value() const { return times_power(tail + 1.f, n); }
  VecF minus_one() const { return select(n == 0.f, tail, value() - 1.f); }
};

// x - k pi, |x| <= 8192, k the nearest whole number: pi in three parts, of which the products of
// the first two with k are exact. Where a product and a sum are rounded once, both are one: what it
// leaves is a multiple of 2^-23 below 2.
static inline VecF minus_turns(VecF x, VecF k) {
  constexpr float first = 3.140625f, second = 9.67502593994140625e-4f, third = 1.50995799e-7f;
  if constexpr (has_fma) return multiply_add(k, -third, multiply_add(k, -(first + second), x));
  return ((x - k * first) - k * second) - k * third;
}

// Sine and cosine, |x| <= 8192: polynomials up to pi / 2, fitted to a relative error of 6e-9 and an
// absolute one of 4e-10. Half as many operations as between multiples of pi / 2, where each lane
// takes one of both. Next to its zeros a cosine has as many places as 1 has, and a sine, many turns
// from 0, as many as what is left of pi.
struct SineCosine {
  VecF sine, cosine;

  explicit SineCosine(VecF x) {
    const Rounded k(x * 0.318309886183790672f);
    const VecF r = minus_turns(x, k.rounded), r2 = r * r, r3 = r2 * r;
    VecF s = 2.606081807e-6f * r2 - 1.9809773949e-4f;
    VecF c = -2.6209016823e-7f * r2 + 2.4770179152e-5f;
    s = s * r2 + 8.3330692723e-3f;
    c = c * r2 - 1.3888585381e-3f;
    s = s * r2 - 1.6666659713e-1f;
    c = c * r2 + 4.1666656733e-2f;
    c = c * r2 - 0.5f;
    const VecI sign = k.steps << 31;
    sine = bits_to_float(bit_cast<VecI>(s * r3 + r) ^ sign);
    cosine = bits_to_float(bit_cast<VecI>(c * r2 + 1.f) ^ sign);
  }
};

// Between -most and most; NaN stays.
static inline VecF clamp(VecF x, float most) {
  x = select(x > most, broadcast(most), x);
  return select(x < -most, broadcast(-most), x);
}

static inline VecF sigmoid(VecF x) { return 1.f / (1.f + Exponential(-x).value()); }

// log(1 + u), 0 <= u <= 1; what rounding takes from 1 + u comes back divided by it.
static inline VecF log1p(VecF u) {
  const VecF w = u + 1.f, lost = (u - (w - 1.f)) / w;
  const VecI far = w > 1.41421356f;
  const VecF x = select(far, 0.5f * w, w) - 1.f, x2 = x * x;
  const VecF twice = select(far, broadcast(1), VecF{});  // times log(2), in two parts
  VecF p = 7.0376836292e-2f * x - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  const VecF small = p * x * x2 - 0.5f * x2 - 2.12194440e-4f * twice + lost;
  return x + small + 0.693359375f * twice;
}

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

// The normal distribution: the chance of a number below x, and its density. Near 0 an odd
// polynomial and 1/2; elsewhere e^(-x^2/2) / |x| times a function that varies little, a polynomial
// of (|x| - 2.5) /
// (|x| + 2). Both fitted to a relative error of 1e-8. From 15 on all is rounded to 0 or 1.
struct Normal {
  VecF x, size, bell, centre, outside;

  explicit Normal(VecF number) : x(number), size(clamp(magnitude(number), 15)) {
    bell = Exponential(exactly(size, [](Vec<double> v) { return v * v * -0.5; })).value();
    const VecF x2 = size * size;
    VecF p = -7.65420712e-06f * x2 + 1.13486369e-4f;
    p = p * x2 - 1.18632994e-3f;
    p = p * x2 + 9.97332341e-3f;
    p = p * x2 - 6.64903599e-2f;
    p = p * x2 + 3.9894228e-1f;
    centre = p * x + 0.5f;
    const VecF t = (size - 2.5f) / (size + 2.f);
    VecF q = 4.80944993e-4f * t + 2.51873291e-4f;
    q = q * t - 2.19224846e-3f;
    q = q * t - 3.66592863e-3f;
    q = q * t + 9.55435146e-3f;
    q = q * t + 2.82691315e-2f;
    q = q * t - 1.09907073e-1f;
    q = q * t + 1.22833987e-1f;
    q = q * t + 3.53328328e-1f;
    outside = q * bell;
  }

  VecF below() const {
    const VecF tail = outside / size;
    return select(size < 1.f, centre, select(x > 0.f, 1.f - tail, tail));
  }
  VecF times_below() const {  // x below(), but far from 0 without dividing by x
    return select(size < 1.f, x * centre, select(x > 0.f, x - outside, x * 0.f - outside));
  }
  VecF density() const { return bell * 0.39894228040143268f; }
};

template <class F>
static inline VecF each(VecF x, const F& f) {
  for (int i = 0; i < width<float>; ++i) x[i] = f(x[i]);
  return x;
}

}  // namespace hyperfast::HF_ISA
