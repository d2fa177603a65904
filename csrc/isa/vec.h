// Vectors of one instruction set: compiler vector types, so that one source serves them all.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "../kernels.h"
#include "../runtime.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define HF_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define HF_VECTOR_BYTES 32
#else
#define HF_VECTOR_BYTES 16
#endif

namespace hyperfast::HF_ISA {

#ifdef __AMX_BF16__
constexpr bool has_matrix_unit = true;
#else
constexpr bool has_matrix_unit = false;
#endif

// ---- storage types: how elements lie in memory; arithmetic is in Acc<T> ----

struct bf16 {
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
static inline float widen(f16 v) {
#ifdef __F16C__
  return _cvtsh_ss(v.bits);
#else
  const std::uint32_t sign = std::uint32_t(v.bits & 0x8000u) << 16;
  const std::uint32_t rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // 2^112 moves the exponent bias from 15 to 127 and normalises subnormals on the way.
  const float magnitude = bit_cast<float>(rest << 13) * 0x1p112f;
  return bit_cast<float>(sign | bit_cast<std::uint32_t>(magnitude));
#endif
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
template <>
inline f16 narrow<f16>(float v) {
#ifdef __F16C__
  return {std::uint16_t(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT))};
#else
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
#endif
}

// ---- vectors ----

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(HF_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;

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
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
static inline void store_part(T* p, Vec<T> v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}
#ifdef __AVX512F__
template <>
inline void store_part<float>(float* p, Vec<float> v, int n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), __m512(v));
}
template <>
inline void store_part<double>(double* p, Vec<double> v, int n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), __m512d(v));
}
template <>
inline Vec<float> load_part<float>(const float* p, int n) {
  return Vec<float>(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
}
template <>
inline Vec<double> load_part<double>(const double* p, int n) {
  return Vec<double>(_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p));
}
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

// A vector of Acc<T> from elements stored as T.
static inline Vec<float> load_wide(const float* p) { return load(p); }
static inline Vec<double> load_wide(const double* p) { return load(p); }
static inline Vec<float> load_wide(const bf16_pair* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline Vec<float> load_wide(const bf16* p) {
#if defined(__AVX512F__)
  return Vec<float>(_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)));
#elif defined(__AVX2__)
  return Vec<float>(_mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16)));
#else
  Vec<float> v;
  for (int i = 0; i < width<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}
static inline Vec<float> load_wide(const f16* p) {
#if defined(__AVX512F__)
  return Vec<float>(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
#elif defined(__AVX2__)
  return Vec<float>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
#else
  Vec<float> v;
  for (int i = 0; i < width<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

static inline Vec<float> load_wide(const std::int8_t* p) {
#if defined(__AVX512F__)
  return Vec<float>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))));
#elif defined(__AVX2__)
  return Vec<float>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))));
#else
  Vec<float> v;
  for (int i = 0; i < width<float>; ++i) v[i] = p[i];
  return v;
#endif
}

// ---- threads and scratch, typed ----

template <class F>
static void parallel(Index n, Index grain, const F& body) {
  run_parallel(
      n, grain,
      [](Index begin, Index end, void* f) { (*static_cast<const F*>(f))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

template <class T>
static inline T* scratch(Slot slot, Index n) {
  return static_cast<T*>(hyperfast::scratch(slot, std::size_t(n) * sizeof(T)));
}

// Own versions: an out-of-line copy of a std template from this build could be linked into another.
static inline Index min(Index a, Index b) { return a < b ? a : b; }
static inline Index max(Index a, Index b) { return a < b ? b : a; }
static inline Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
static inline Index round_up(Index a, Index b) { return ceil_div(a, b) * b; }

}  // namespace hyperfast::HF_ISA
