// What AVX2 (with FMA and F16C), AVX-512 and its bf16 do in an instruction of their own.
#pragma once

#include <immintrin.h>

#include "isa/simd/number.h"

namespace hyperfast::HF_ISA {

constexpr bool has_fma = true;

static inline float widen(f16 v) { return _cvtsh_ss(v.bits); }

template <>
inline f16 narrow<f16>(float v) {
  return {std::uint16_t(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT))};
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

static inline Vec<float> widen_half(__m256i half, bf16) {
  return Vec<float>(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
}
static inline Vec<float> widen_half(__m256i half, f16) { return Vec<float>(_mm512_cvtph_ps(half)); }
static inline Vec<float> load_wide(const bf16* p) {
  return widen_half(_mm256_loadu_si256((const __m256i*)p), bf16{});
}
static inline Vec<float> load_wide(const f16* p) {
  return widen_half(_mm256_loadu_si256((const __m256i*)p), f16{});
}
static inline Vec<float> load_wide(const std::int8_t* p) {
  return Vec<float>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))));
}

template <>
inline Vec<float> load_wide_part<bf16>(const bf16* p, int n) {
  return widen_half(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p), bf16{});
}
template <>
inline Vec<float> load_wide_part<f16>(const f16* p, int n) {
  return widen_half(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p), f16{});
}

template <>
inline void store_narrow<f16>(f16* p, Vec<float> v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT));
}
// Not by the instruction of its own, which takes subnormal numbers for zero.
template <>
inline void store_narrow<bf16>(bf16* p, Vec<float> v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(__m512i(nearest_bf16(v) >> 16)));
}

// a where it is larger, else b: NaN in b passes.
static inline Vec<float> maximum(Vec<float> a, Vec<float> b) {
  return Vec<float>(_mm512_max_ps(__m512(a), __m512(b)));
}

// v times 2^n, n whole.
static inline Vec<float> times_power(Vec<float> v, Vec<float> n) {
  return Vec<float>(_mm512_scalef_ps(__m512(v), __m512(n)));
}

// a b + c, rounded once.
static inline Vec<float> multiply_add(Vec<float> a, float b, Vec<float> c) {
  return Vec<float>(_mm512_fmadd_ps(__m512(a), _mm512_set1_ps(b), __m512(c)));
}

static inline bool any(VecI mask) {
  return _mm512_test_epi32_mask(__m512i(mask), __m512i(mask)) != 0;
}

#else

// The first n of w lanes.
static inline __m256i first_lanes(int n, std::int32_t) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline __m256i first_lanes(int n, std::int64_t) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
template <>
inline Vec<float> load_part<float>(const float* p, int n) {
  return Vec<float>(_mm256_maskload_ps(p, first_lanes(n, std::int32_t{})));
}
template <>
inline Vec<double> load_part<double>(const double* p, int n) {
  return Vec<double>(_mm256_maskload_pd(p, first_lanes(n, std::int64_t{})));
}

static inline Vec<float> load_wide(const bf16* p) {
  const __m128i half = _mm_loadu_si128((const __m128i*)p);
  return Vec<float>(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)));
}
static inline Vec<float> load_wide(const f16* p) {
  return Vec<float>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
}
static inline Vec<float> load_wide(const std::int8_t* p) {
  return Vec<float>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))));
}

template <>
inline void store_narrow<f16>(f16* p, Vec<float> v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
}

static inline Vec<float> maximum(Vec<float> a, Vec<float> b) {
  return Vec<float>(_mm256_max_ps(__m256(a), __m256(b)));
}

// a b + c, rounded once.
static inline Vec<float> multiply_add(Vec<float> a, float b, Vec<float> c) {
  return Vec<float>(_mm256_fmadd_ps(__m256(a), _mm256_set1_ps(b), __m256(c)));
}

static inline bool any(VecI mask) { return _mm256_movemask_epi8(__m256i(mask)) != 0; }

#endif

#ifdef __AVX512BF16__
constexpr bool has_pair_dot = true;

// The entries are pairs of bf16: acc + a.first * b.first + a.second * b.second, twice the rate.
static inline Vec<float> add_pairs(Vec<float> acc, float a, Vec<float> b) {
  return Vec<float>(_mm512_dpbf16_ps(__m512(acc), __m512bh(_mm512_set1_ps(a)), __m512bh(b)));
}
#endif

}  // namespace hyperfast::HF_ISA
