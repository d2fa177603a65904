// What simd/x86.h has instructions for, in plain C++.
#pragma once

#include "isa/simd/number.h"

namespace hyperfast::HF_ISA {

constexpr bool has_fma = false;
static inline Vec<float> multiply_add(Vec<float>, float, Vec<float> c) { return c; }  // never run

static inline float widen(f16 v) {
  const std::uint32_t sign = std::uint32_t(v.bits & 0x8000u) << 16;
  const std::uint32_t rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // 2^112 moves the exponent bias from 15 to 127 and normalises subnormals on the way.
  const float magnitude = bit_cast<float>(rest << 13) * 0x1p112f;
  return bit_cast<float>(sign | bit_cast<std::uint32_t>(magnitude));
}

template <>
inline f16 narrow<f16>(float v) {
  const auto bits = bit_cast<std::uint32_t>(v);
  const auto sign = std::uint16_t(bits >> 16 & 0x8000u);
  const std::uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {std::uint16_t(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return {std::uint16_t(sign | 0x7c00u)};  // 65520 and up: infinity
  if (rest < 0x38800000u) {  // subnormal: adding 1/2 aligns the bits at 2^-24 and rounds to even
    const float aligned = bit_cast<float>(rest) + 0.5f;
    return {std::uint16_t(sign | (bit_cast<std::uint32_t>(aligned) - 0x3f000000u))};
  }
  return {std::uint16_t(sign | ((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13))};
}

template <class T>
static inline Vec<float> load_wide(const T* p) {
  Vec<float> v;
  for (int i = 0; i < width<float>; ++i) v[i] = widen(p[i]);
  return v;
}

static inline Vec<float> maximum(Vec<float> a, Vec<float> b) { return a > b ? a : b; }

static inline bool any(VecI mask) {
  std::int32_t found = 0;
  for (int i = 0; i < width<float>; ++i) found |= mask[i];
  return found != 0;
}

}  // namespace hyperfast::HF_ISA
