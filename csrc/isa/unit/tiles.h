// The instructions of the matrix unit; or, in a build for tests on machines without one
// (HYPERFAST_EMULATE_AMX, setup.py), what they do, rounding included, on an array.
#pragma once

#include "isa/common.h"
#include "isa/simd/vector.h"

#if defined(__AMX_BF16__) || defined(HF_EMULATE_AMX)
#define HF_MATRIX_UNIT
#endif

namespace hyperfast::HF_ISA {

#ifdef HF_MATRIX_UNIT
constexpr bool has_matrix_unit = true;
#else
constexpr bool has_matrix_unit = false;
#endif

}  // namespace hyperfast::HF_ISA

#ifdef HF_MATRIX_UNIT

namespace hyperfast::HF_ISA {

// All eight registers are 16 lines of 64 bytes.
constexpr Index tile_side = 16, tile_line = 64;

struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {};
  std::uint8_t rows[16] = {};

  TileShapes() {
    for (int i = 0; i < 8; ++i) bytes[i] = tile_line, rows[i] = tile_side;
  }
};

#ifdef HF_EMULATE_AMX

struct alignas(64) Register {
  std::uint32_t line[tile_side][tile_side];
};

static thread_local Register emulated[8];
static thread_local bool configured = false;

// The unit, too, ends a program that uses it otherwise.
static inline void expect(bool holds) {
  if (!holds) __builtin_trap();
}

static void configure_tiles(const TileShapes& shapes) {
  expect(shapes.palette == 1);
  for (int i = 0; i < 8; ++i)
    expect(shapes.bytes[i] == tile_line && shapes.rows[i] == tile_side), emulated[i] = {};
  configured = true;
}
static void release_tiles() { configured = false; }

template <int To>
static void load_tile(const void* from, Index bytes) {
  expect(configured);
  for (Index i = 0; i < tile_side; ++i)
    std::memcpy(emulated[To].line[i], static_cast<const char*>(from) + i * bytes, tile_line);
}
template <int From>
static void store_tile(void* to, Index bytes) {
  expect(configured);
  for (Index i = 0; i < tile_side; ++i)
    std::memcpy(static_cast<char*>(to) + i * bytes, emulated[From].line[i], tile_line);
}
template <int To>
static void zero_tile() {
  expect(configured);
  emulated[To] = {};
}

// C += A B: products of the first and of the second of all pairs are added up apart, from zero and
// each rounded once, then both sums to C.
[[gnu::noinline]] static void add_products_of(Register& c, const Register& a, const Register& b) {
  expect(configured);
  // Whatever this thread has set, the unit rounds to nearest even, takes subnormal numbers for
  // zero, and makes none.
  constexpr unsigned flush = 0x8000, zeros = 0x0040, masked = 0x1f80;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(flush | zeros | masked);
  __asm__ volatile("" ::: "memory");
  const auto first = [](__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  };
  const auto second = [](__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))));
  };
  for (Index m = 0; m < tile_side; ++m) {
    __m512 firsts = _mm512_setzero_ps(), seconds = _mm512_setzero_ps();
    for (Index k = 0; k < tile_side; ++k) {
      const __m512i left = _mm512_set1_epi32(int(a.line[m][k])),
                    right = _mm512_load_si512(b.line[k]);
      firsts = _mm512_fmadd_ps(first(left), first(right), firsts);
      seconds = _mm512_fmadd_ps(second(left), second(right), seconds);
    }
    const __m512 sum = _mm512_load_ps(c.line[m]);
    _mm512_store_ps(c.line[m], _mm512_add_ps(sum, _mm512_add_ps(firsts, seconds)));
  }
  __asm__ volatile("" ::: "memory");
  _mm_setcsr(before);
}
template <int C, int A, int B>
static void add_products() {
  add_products_of(emulated[C], emulated[A], emulated[B]);
}

#else

static inline void configure_tiles(const TileShapes& shapes) {
  __asm__ volatile("" ::"r"(&shapes)
                   : "memory");  // gcc 12 takes 8 bytes of it for all that is read
  _tile_loadconfig(&shapes);
}
static inline void release_tiles() { _tile_release(); }

// What the intrinsics of gcc write, which take the number of a register only as it is spelled.
template <int To>
[[gnu::always_inline]] static inline void load_tile(const void* from, Index bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(To));
}
template <int From>
[[gnu::always_inline]] static inline void store_tile(void* to, Index bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes), "i"(From) : "memory");
}
template <int To>
[[gnu::always_inline]] static inline void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(To));
}
// C += A B
template <int C, int A, int B>
[[gnu::always_inline]] static inline void add_products() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

// The tile registers of this thread, for as long as it lives.
struct TileRegisters {
  TileRegisters() { configure_tiles(TileShapes()); }
  ~TileRegisters() { release_tiles(); }
  TileRegisters(const TileRegisters&) = delete;
};

// The compiler does not see that tile loads read memory.
static inline void written() { __asm__ volatile("" ::: "memory"); }

}  // namespace hyperfast::HF_ISA

#endif
