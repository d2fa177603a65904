// How numbers lie in memory; arithmetic is in Acc<T>.
#pragma once

#include <cstdint>
#include <cstring>

namespace hyperfast::HF_ISA {

// Two of them are read as one number of 32 bits, so a compiler may not take that for another
// object.
struct __attribute__((may_alias)) bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

// Two neighbouring bf16, kept together as the 32 bits that the paired dot product takes.
struct bf16_pair {
  bf16 first, second;
};

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

template <class To, class From>
static inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

static inline double widen(double v) { return v; }
static inline float widen(float v) { return v; }
static inline float widen(std::int8_t v) { return v; }
static inline float widen(bf16 v) { return bit_cast<float>(std::uint32_t{v.bits} << 16); }
static inline float widen(bf16_pair v) { return bit_cast<float>(v); }  // the bits, not a number

// The pair that begins at p, anywhere, as a number of 32 bits.
static inline float pair_at(const bf16* p) {
  float pair;
  std::memcpy(&pair, p, sizeof pair);
  return pair;
}
// Whether pairs that begin at p are aligned.
static inline bool holds_pairs(const bf16* p) {
  return reinterpret_cast<std::uintptr_t>(p) % sizeof(bf16_pair) == 0;
}

template <class T>
static inline T narrow(Acc<T> v) {
  return v;
}
template <>
inline bf16 narrow<bf16>(float v) {
  const auto bits = bit_cast<std::uint32_t>(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {std::uint16_t(bits >> 16 | 0x40)};  // quiet NaN
  return {std::uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}
}  // namespace hyperfast::HF_ISA
