// Activations: one table, and below it value and slope of each. A new one is a row and a formula.
//
// In float: simd/math.h, within 3 units in the last place but next to zeros of sines; in double:
// the C library's functions. What is not finite gives what PyTorch makes of it in double.
#pragma once

#include <cmath>

// Name, and the parameter where the text of a network has none (NAN: it takes none).
#define HF_ACTIVATIONS(ROW) \
  ROW(relu, NAN)            \
  ROW(leaky_relu, 0.01)     \
  ROW(elu, NAN)             \
  ROW(sigmoid, NAN)         \
  ROW(silu, NAN)            \
  ROW(sin, 1.0)             \
  ROW(tanh, NAN)            \
  ROW(gelu, NAN)            \
  ROW(gelu_tanh, NAN)       \
  ROW(softplus, NAN)

namespace hyperfast {

#define HF_NAME(name, parameter) , name
enum class Act { identity HF_ACTIVATIONS(HF_NAME) };
#undef HF_NAME

}  // namespace hyperfast

#ifdef HF_ISA
#include "isa/simd/math.h"

namespace hyperfast::HF_ISA {

template <class V>
struct ValueAndSlope {
  V value, slope;
};
using Floats = ValueAndSlope<VecF>;
using Double = ValueAndSlope<double>;

template <Act>
struct Formula;

template <>
struct Formula<Act::identity> {
  static Floats of(VecF x, float) { return {x, broadcast(1)}; }
  static Double of(double x, double) { return {x, 1}; }
};

template <>
struct Formula<Act::relu> {  // NaN passes, as in PyTorch
  static Floats of(VecF x, float) {
    return {maximum(VecF{}, x), select(x <= 0.f, VecF{}, broadcast(1))};
  }
  static Double of(double x, double) { return {x <= 0 ? 0 : x, x <= 0 ? 0. : 1.}; }
};

template <>
struct Formula<Act::leaky_relu> {
  static Floats of(VecF x, float below) {
    return {select(x > 0.f, x, x * below), select(x > 0.f, broadcast(1), broadcast(below))};
  }
  static Double of(double x, double below) { return {x > 0 ? x : x * below, x > 0 ? 1 : below}; }
};

template <>
struct Formula<Act::elu> {
  static Floats of(VecF x, float) {
    const Exponential e(select(x > 0.f, VecF{}, x));
    return {select(x > 0.f, x, e.minus_one()), e.value()};
  }
  static Double of(double x, double) { return {x > 0 ? x : ::expm1(x), x > 0 ? 1 : ::exp(x)}; }
};

template <>
struct Formula<Act::sigmoid> {
  static Floats of(VecF x, float) {
    const VecF s = sigmoid(x);
    return {s, s * (1.f - s)};
  }
  static Double of(double x, double) {
    const double s = 1 / (1 + ::exp(-x));
    return {s, s * (1 - s)};
  }
};

template <>
struct Formula<Act::silu> {
  static Floats of(VecF x, float) {
    const VecF s = sigmoid(x);
    return {x * s, s * (1.f + x * (1.f - s))};
  }
  static Double of(double x, double) {
    const double s = 1 / (1 + ::exp(-x));
    return {x * s, s * (1 + x * (1 - s))};
  }
};

template <>
struct Formula<Act::sin> {
  static Floats of(VecF x, float frequency) { return of_product(x * frequency, frequency); }
  static Double of(double x, double frequency) {
    return {::sin(x * frequency), ::cos(x * frequency) * frequency};
  }

  // Of w = frequency x.
  static Floats of_product(VecF w, float frequency) {
    if (any(size(w) > most))  // or not a number
      return {each(w, [](float v) { return float(::sin(double(v))); }),
              each(w, [](float v) { return float(::cos(double(v))); }) * frequency};
    return near(w, frequency);
  }
  // The same where the size of w is `most` at most.
  static Floats near(VecF w, float frequency) {
    const SineCosine both(w);
    return {both.sine, both.cosine * frequency};
  }
  // Ordered as magnitudes are; what is not a number comes last.
  static VecI size(VecF w) { return bit_cast<VecI>(magnitude(w)); }
  static constexpr std::int32_t most = 0x46000000;  // 8192
};

template <>
struct Formula<Act::tanh> {
  static Floats of(VecF x, float) {
    const VecF t = HF_ISA::tanh(x);
    return {t, 1.f - t * t};
  }
  static Double of(double x, double) {
    const double t = ::tanh(x);
    return {t, 1 - t * t};
  }
};

template <>
struct Formula<Act::gelu> {  // x times the chance that a normal number is below x
  static Floats of(VecF x, float) {
    const Normal n(x);
    return {n.times_below(), n.below() + x * n.density()};
  }
  static Double of(double x, double) {
    const double below = 0.5 * ::erfc(x * -0.70710678118654752440);
    return {x * below, below + x * 0.39894228040143267794 * ::exp(-0.5 * x * x)};
  }
};

template <>
struct Formula<Act::gelu_tanh> {  // (1 + tanh(w / 2)) / 2 is sigmoid(w), w = linear x + cubic x^3
  static constexpr double linear = 1.59576912160573071176, cubic = linear * 0.044715;

  static Floats of(VecF x, float) {
    const VecF near = clamp(x, 15);  // beyond: 0 and 1
    const Exact w = exactly(near, [](Vec<double> v) { return v * (linear + cubic * v * v); });
    const VecF e = Exponential(w.minus_magnitude()).value(), larger = 1.f / (1.f + e);
    const VecF s = select(near > 0.f, larger, e * larger);
    const VecF steep = float(linear) + float(3 * cubic) * near * near;
    return {x * s, s + x * (e * larger * larger) * steep};
  }
  static Double of(double x, double) {
    const double near = x > 25 ? 25 : x < -25 ? -25 : x;
    const double s = 1 / (1 + ::exp(-near * (linear + cubic * near * near)));
    return {x * s, s + x * (s * (1 - s)) * (linear + 3 * cubic * near * near)};
  }
};

template <>
struct Formula<Act::softplus> {  // log(1 + e^x), and beyond 20 x itself, as in PyTorch
  static Floats of(VecF x, float) {
    const VecF u = Exponential(-magnitude(x)).value();
    return {select(x > 0.f, x, VecF{}) + log1p(u), sigmoid(x)};
  }
  static Double of(double x, double) {
    return x > 20 ? Double{x, 1} : Double{::log1p(::exp(x)), 1 / (1 + ::exp(-x))};
  }
};

}  // namespace hyperfast::HF_ISA
#endif
