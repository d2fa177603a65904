// Vectors of one instruction set: compiler vector types, so that one source serves them all.
#pragma once

#include <type_traits>
#include <utility>

#include "isa/simd/number.h"

#if defined(__AVX512F__)
#define HF_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define HF_VECTOR_BYTES 32
#else
#define HF_VECTOR_BYTES 16
#endif

namespace hyperfast::HF_ISA {

// Whether a vector unit has 32 registers, or 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool many_registers = true;
#else
constexpr bool many_registers = false;
#endif

// Whether parts of a vector of 16-bit numbers are loaded by an instruction.
#ifdef __AVX512F__
constexpr bool loads_halves_in_part = true;
#else
constexpr bool loads_halves_in_part = false;
#endif

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(HF_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;

using VecF = Vec<float>;
using VecI = Vec<std::int32_t>;

template <class T>
constexpr int width = HF_VECTOR_BYTES / int(sizeof(T));

template <class T>
static inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
static inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// The first n elements, zeros behind; reads nothing beyond them.
template <class T>
static inline Vec<T> load_part(const T* p, int n) {
  T buffer[width<T>] = {};
  for (int i = 0; i < n && i < width<T>; ++i) buffer[i] = p[i];  // the bound is for GCC's warnings
  return load(buffer);
}
template <class T>
static inline void store_part(T* p, Vec<T> v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}
// A vector of Acc<T> as elements of T, each rounded to nearest.
template <class T>
static inline void store_narrow(T* p, Vec<Acc<T>> v) {
  if constexpr (std::is_same_v<T, Acc<T>>)
    store(p, v);
  else
    for (int i = 0; i < width<Acc<T>>; ++i) p[i] = narrow<T>(v[i]);
}
// The nearest numbers of bf16, ties to even, in the upper halves of lanes; NaN becomes quiet.
static inline Vec<std::uint32_t> nearest_bf16(VecF v) {
  const auto bits = bit_cast<Vec<std::uint32_t>>(v);
  return v == v ? bits + (0x7fff + (bits >> 16 & 1)) : bits | 0x400000;
}
// A vector of Acc<T> from elements stored as T.
static inline Vec<float> load_wide(const float* p) { return load(p); }
static inline Vec<double> load_wide(const double* p) { return load(p); }
static inline Vec<float> load_wide(const bf16_pair* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The same of the first n, zeros behind; reads nothing beyond them.
template <class T>
static inline Vec<Acc<T>> load_wide_part(const T* p, int n) {
  if constexpr (std::is_same_v<T, Acc<T>>) return load_part(p, n);
  Acc<T> buffer[width<Acc<T>>] = {};
  for (int i = 0; i < n && i < width<Acc<T>>; ++i) buffer[i] = widen(p[i]);
  return load(buffer);
}

}  // namespace hyperfast::HF_ISA

#ifdef __AVX2__
#include "isa/simd/x86.h"
#else
#include "isa/simd/portable.h"
#endif

namespace hyperfast::HF_ISA {

#ifndef __AVX512BF16__
constexpr bool has_pair_dot = false;
static inline Vec<float> add_pairs(Vec<float> acc, float, Vec<float>) { return acc; }  // never run
#endif

// Sum of the lanes, by halves: the order is fixed, hence deterministic.
template <int Half, class T, int... I>
static inline Vec<T> add_half(Vec<T> v, std::integer_sequence<int, I...>) {
  return v + __builtin_shufflevector(v, v, (I ^ Half)...);
}
template <class T, int Half = width<T> / 2>
static inline T sum(Vec<T> v) {
  if constexpr (Half == 0) {
    return v[0];
  } else {
    return sum<T, Half / 2>(add_half<Half, T>(v, std::make_integer_sequence<int, width<T>>{}));
  }
}

// Exchanges the off-diagonal halves of every 2*Half block of a square of vectors.
template <int Half, class T, int... I>
static inline void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, I...>) {
  constexpr int w = width<T>;
  const Vec<T> low = __builtin_shufflevector(a, b, (I & Half ? I - Half + w : I)...);
  const Vec<T> high = __builtin_shufflevector(a, b, (I & Half ? I + w : I + Half)...);
  a = low;
  b = high;
}
template <class T, int Half = width<T> / 2>
static inline void transpose(Vec<T> (&rows)[width<T>]) {
  if constexpr (Half > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < width<T>; ++i)
      if (!(i & Half))
        exchange<Half, T>(rows[i], rows[i + Half], std::make_integer_sequence<int, width<T>>{});
    transpose<T, Half / 2>(rows);
  }
}

// The first halves of a and b, side by side.
template <class T, int... I>
static inline Vec<T> low_halves(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  constexpr int w = width<T>;
  return __builtin_shufflevector(a, b, (I < w / 2 ? I : I + w / 2)...);
}
// Both squares that lie side by side in half as many vectors as have lanes.
template <class T, int Half = width<T> / 4>
static inline void transpose_halves(Vec<T> (&rows)[width<T> / 2]) {
  if constexpr (Half > 0) {
#pragma GCC unroll 8
    for (int i = 0; i < width<T> / 2; ++i)
      if (!(i & Half))
        exchange<Half, T>(rows[i], rows[i + Half], std::make_integer_sequence<int, width<T>>{});
    transpose_halves<T, Half / 2>(rows);
  }
}

// The sums of the lanes of each of `width` vectors, side by side: by halves, all at once, which
// takes less than a third of one after another.
template <class T, int Half = width<T> / 2>
static inline Vec<T> sums(Vec<T> (&rows)[width<T>]) {
  if constexpr (Half == 0) {
    return rows[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < Half; ++i) {
      exchange<Half, T>(rows[i], rows[i + Half], std::make_integer_sequence<int, width<T>>{});
      rows[i] += rows[i + Half];
    }
    return sums<T, Half / 2>(rows);
  }
}

}  // namespace hyperfast::HF_ISA
