// Functions of float vectors: polynomials after range reduction, within 3 units in the last place
// (tests/test_cpp_mlp.py); the coefficients are those of Moshier's Cephes library.
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

// e^x = 2^n (1 + tail) with |r| <= ln(2) / 2.
struct Exponential {
  VecI n;
  VecF tail;

  explicit Exponential(VecF x) {
    x = select(x > 89.f, broadcast(89), x);  // beyond: infinity, and 0
    x = select(x < -104.f, broadcast(-104), x);
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
        ((2.443315711809948e-5f * r2 - 1.388731625493765e-3f) * r2 + 4.166664568298827e-2f) * r2 *
            r2 -
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

}  // namespace hyperfast::HF_ISA
