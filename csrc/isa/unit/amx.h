// Matrix products on the CPU's matrix unit (AMX), which multiplies bf16 and adds up in float.
//
// A float is the exact sum of three bf16 (8 + 8 + 8 bits). Of the nine products of two such sums,
// the three smallest come to less than 2^-25 of the whole and are left out; the other six run
// at 2.7 times the rate of float multiply-adds, and round less often: the result is no less
// accurate than theirs. Where PyTorch's switch allows it, a float is rounded to the sum of two, and
// three products are made ("high"), or to one ("medium"). The unit takes subnormal numbers for
// zero. Operands with numbers so large or small that this, an infinity or a NaN could show are
// found while they are packed (`Range`), and go to the vector units instead.
#pragma once

#include "isa/product/pack.h"
#include "isa/unit/tiles.h"
#include "torch/precision.h"

#ifdef HF_MATRIX_UNIT

namespace hyperfast::HF_ISA {

// A tile of C holds 16 x 16 floats; one of A 16 rows of 32 bf16; one of B 16 lines, of which line j
// holds rows j and j + 16 of B in turns. A's columns lie in the same order, hence also in lines of
// 16 pairs.
constexpr Index tile_depth = 32, tile_elements = tile_side * tile_depth;
constexpr Index two_tiles = 2 * tile_side;

// Bytes of the second-level cache for what a thread holds of its tasks.
constexpr Index unit_bytes = 1 << 20;

template <int N>
using Count = std::integral_constant<int, N>;

// Calls body with the number of bf16 that elements count for: all there is to a bf16; of floats as
// many as PyTorch's switch asks for; three of what else is computed in float.
template <class T, class F>
static bool with_parts(const F& body) {
  if constexpr (std::is_same_v<T, bf16>) {
    return body(Count<1>{});
  } else {
    if constexpr (std::is_same_v<T, float>) {
      const int parts = parts_of_float();
      if (parts == 1) return body(Count<1>{});
      if (parts == 2) return body(Count<2>{});
    }
    return body(Count<3>{});
  }
}

// Whether these parts add up to any number that is computed from elements of T.
template <class T, int Parts>
constexpr bool exact_parts = Parts == 3 || !std::is_same_v<T, float>;

// The largest and the smallest magnitude among packed elements that are not zero, rounded to the
// upper half of a float; 0 where there are none. A NaN, or infinity, is above all others.
struct Range {
  std::uint32_t largest = 0, smallest = 0;

  // Whether products with `other` are the unit's business: no part of a number, nor of a product,
  // is subnormal then. As it asks of every pair of blocks the same, it does not matter how operands
  // are cut into blocks.
  bool suits(Range other) const {
    constexpr std::uint32_t most = (127 + 60) << 7, least = (127 - 100) << 7;  // 2^60, 2^-100
    if (largest > most || other.largest > most) return false;
    if (!largest || !other.largest) return true;
    const auto number = [](std::uint32_t bits) { return bit_cast<float>(bits << 16); };
    return smallest >= least && other.smallest >= least &&
           number(smallest) * number(other.smallest) >= 0x1p-100f;
  }
};

// What threads find out together: whether all operands so far have been the unit's business.
struct Verdict {
  bool good = true;

  bool holds(Range a, Range b) {
    if (!__atomic_load_n(&good, __ATOMIC_RELAXED)) return false;
    const bool suits = a.suits(b);
    if (!suits) __atomic_store_n(&good, false, __ATOMIC_RELAXED);
    return suits;
  }
};

using Bits = std::uint32_t __attribute__((vector_size(64)));

// What finds the range. Among others, a number below 2^-133 is taken for zero.
struct Magnitudes {
  __m512i largest = _mm512_setzero_si512(),
          before_smallest = _mm512_set1_epi16(-1);  // of 1 less: zero is the last
  Bits any = {};

  // Of a line of leading parts; `some` has all bits of what they are of.
  void include(__m512i leading, Bits some) {
    const __m512i magnitude = _mm512_and_si512(leading, _mm512_set1_epi16(0x7fff));
    largest = _mm512_max_epu16(largest, magnitude);
    before_smallest =
        _mm512_min_epu16(before_smallest, _mm512_sub_epi16(magnitude, _mm512_set1_epi16(1)));
    any |= some;
  }
  Range range() const {
    std::uint16_t high[32], low[32], most = 0, least = 0xffff;
    std::memcpy(high, &largest, sizeof high);
    std::memcpy(low, &before_smallest, sizeof low);
    for (int i = 0; i < 32; ++i) {
      most = high[i] > most ? high[i] : most;
      least = low[i] < least ? low[i] : least;
    }
    bool zero = most == 0;
    for (int i = 0; zero && i < tile_side; ++i) zero = (any[i] & 0x7fffffffu) == 0;
    if (zero) return {};
    return {most ? most : 1u, most ? least + 1u : 1u};
  }
};

// Takes the next part off a number; it is the upper half of what is returned. Parts are rounded to
// nearest, but for the last of those that add up exactly. Where that turns a NaN of many bits into
// zero, the last part stays one.
template <bool Exact>
static inline Bits take_part(Vec<float>& v, bool last) {
  if (last && Exact) return Bits(v);
  const Bits part = Bits(v) + 0x8000u;
  if (last) return (Bits(v) & 0x7fffffffu) > 0x7f800000u ? Bits(v) : part;
  v -= Vec<float>(part & 0xffff0000u);
  return part;
}

// Lanes of two parts in turns: a line of a tile.
static inline __m512i in_turns(Bits first, Bits second) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, __m512i(first >> 16), __m512i(second));
}

// A line of a tile, and of the tiles of the parts behind it: lanes of a and b in turns.
template <int Parts, bool Exact>
static inline void put_line(bf16* to, Vec<float> a, Vec<float> b, Magnitudes& most) {
  const Bits any = Bits(a) | Bits(b);
#pragma GCC unroll 3
  for (int part = 0; part < Parts; ++part, to += tile_elements) {
    const bool last = part + 1 == Parts;
    const Bits first = take_part<Exact>(a, last), second = take_part<Exact>(b, last);
    const __m512i line = in_turns(first, second);
    if (part == 0) most.include(line, any);
    _mm512_store_si512(to, line);
  }
}

// Where the tiles of an operand are: blocks of 16 rows of A (or columns of B), each `steps` tiles
// deep.
template <int Parts>
struct Packed {
  bf16* data;
  Index steps;

  Packed(bf16* data, Index depth) : data(data), steps(ceil_div(depth, tile_depth)) {}
  bf16* tile(Index block, Index step) const {
    return data + (block * steps + step) * Parts * tile_elements;
  }

  static Index elements(Index rows, Index depth) {
    return ceil_div(rows, tile_side) * ceil_div(depth, tile_depth) * Parts * tile_elements;
  }
};

// The operands are given by pointers to vectors of theirs, whose elements are `step` apart: `n` of
// them, the first `m` elements from number k on. Beyond either, tiles are filled with zeros.

// One tile of A from rows of it (n <= 16).
template <int Parts, class T>
static inline void pack_a_rows(const T* const* rows, Index n, Index m, Index k, Index step,
                               bf16* to, Magnitudes& most) {
  if (n == tile_side && m >= tile_depth && step == 1) {
#pragma GCC unroll 4
    for (Index i = 0; i < tile_side; ++i, to += tile_depth)
      put_line<Parts, exact_parts<T, Parts>>(to, load_wide(rows[i] + k),
                                             load_wide(rows[i] + k + tile_side), most);
    return;
  }
  for (Index i = 0; i < tile_side; ++i, to += tile_depth) {
    float line[tile_depth] = {};
    for (Index j = 0; i < n && j < min(m, tile_depth); ++j)
      line[j] = widen(rows[i][(k + j) * step]);
    put_line<Parts, exact_parts<T, Parts>>(to, load(line), load(line + tile_side), most);
  }
}

// One tile of B from rows of it (n <= 32).
template <int Parts, class T>
static inline void pack_b_rows(const T* const* rows, Index n, Index m, Index k, Index step,
                               bf16* to, Magnitudes& most) {
  const auto line = [&](Index row) -> Vec<float> {
    if (row >= n) return Vec<float>{};
    if (step == 1 && m >= tile_side) return load_wide(rows[row] + k);
    float v[tile_side] = {};
    for (Index j = 0; j < min(m, tile_side); ++j) v[j] = widen(rows[row][(k + j) * step]);
    return load(v);
  };
  for (Index i = 0; i < tile_side; ++i, to += tile_depth)
    put_line<Parts, exact_parts<T, Parts>>(to, line(i), line(i + tile_side), most);
}

// One tile from columns of A (N = 32 of them) or of B (N = 16), which are turned into rows first:
// of A a line is one of them, of B two that lie 16 apart.
template <int Parts, Index N, class T>
static inline void pack_columns(const T* const* columns, Index n, Index m, Index k, Index step,
                                bf16* to, Magnitudes& most) {
  static_assert(N == tile_depth || N == tile_side);
  constexpr Index second = N == tile_depth ? tile_side : tile_side * N;
  const T* from[N];
  float transposed[tile_elements] = {};
  for (Index l = 0; l < n; ++l) from[l] = columns[l] + k * step;
  pack_lanes<float, T>(from, n, min(m, tile_elements / N), step, transposed, N, N);
  for (Index i = 0; i < tile_side; ++i, to += tile_depth)
    put_line<Parts, exact_parts<T, Parts>>(to, load(transposed + i * N),
                                           load(transposed + i * N + second), most);
}

// What sums start from: a tile's rows are `row` floats apart, the next tiles `down` and `right`; or
// null, zero.
struct Start {
  const float* data = nullptr;
  Index row = 0, down = 0, right = 0;
};

// Registers 0 to 3 hold C's tiles, row by row; 4 and 5 two of A; 6 and 7 two of B.
//
// Up to 2 x 2 tiles of C = start + A B; rows of C are `row` floats apart. Successive products of
// parts share an operand, and of three parts run from small to large.
template <int PartsA, int PartsB, int M, int N>
[[gnu::always_inline]] static inline void multiply_tiles(Index steps, const bf16* a0,
                                                         const bf16* a1, const bf16* b0,
                                                         const bf16* b1, Start start, float* c,
                                                         Index row) {
  const auto load_a = [&](Index step, int part) {
    const Index at = (step * PartsA + part) * tile_elements;
    load_tile<4>(a0 + at, tile_line);
    if constexpr (M > 1) load_tile<5>(a1 + at, tile_line);
  };
  const auto load_b = [&](Index step, int part) {
    const Index at = (step * PartsB + part) * tile_elements;
    load_tile<6>(b0 + at, tile_line);
    if constexpr (N > 1) load_tile<7>(b1 + at, tile_line);
  };
  const auto dot = [] {
    add_products<0, 4, 6>();
    if constexpr (N > 1) add_products<1, 4, 7>();
    if constexpr (M > 1) add_products<2, 5, 6>();
    if constexpr (M > 1 && N > 1) add_products<3, 5, 7>();
  };
  written();
  if (start.data) {
    const Index bytes = start.row * Index(sizeof(float));
    load_tile<0>(start.data, bytes);
    if constexpr (N > 1) load_tile<1>(start.data + start.right, bytes);
    if constexpr (M > 1) load_tile<2>(start.data + start.down, bytes);
    if constexpr (M > 1 && N > 1) load_tile<3>(start.data + start.down + start.right, bytes);
  } else {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
  }
  for (Index s = 0; s < steps; ++s) {
    if constexpr (PartsB == 1) {
      load_b(s, 0);
      for (int part = PartsA - 1; part >= 0; --part) load_a(s, part), dot();
    } else if constexpr (PartsA == 1) {
      load_a(s, 0);
      for (int part = PartsB - 1; part >= 0; --part) load_b(s, part), dot();
    } else if constexpr (PartsA == 2 && PartsB == 2) {
      load_a(s, 0), load_b(s, 1), dot();
      load_b(s, 0), dot();
      load_a(s, 1), dot();
    } else {
      static_assert(PartsA == 3 && PartsB == 3);
      load_a(s, 2), load_b(s, 0), dot();
      load_a(s, 1), dot();
      load_b(s, 1), dot();
      load_a(s, 0), dot();
      load_b(s, 2), dot();
      load_b(s, 0), dot();
    }
  }
  const Index bytes = row * Index(sizeof(float));
  store_tile<0>(c, bytes);
  if constexpr (N > 1) store_tile<1>(c + tile_side, bytes);
  if constexpr (M > 1) store_tile<2>(c + tile_side * row, bytes);
  if constexpr (M > 1 && N > 1) store_tile<3>(c + tile_side * row + tile_side, bytes);
}

// Fewer than 2 x 2.
template <int PartsA, int PartsB>
[[gnu::noinline]] static void multiply_edge(Index steps, const bf16* a0, const bf16* a1, Index m,
                                            const bf16* b0, const bf16* b1, Index n, Start start,
                                            float* c, Index row) {
  if (m > 1) return multiply_tiles<PartsA, PartsB, 2, 1>(steps, a0, a1, b0, b1, start, c, row);
  if (n > 1) return multiply_tiles<PartsA, PartsB, 1, 2>(steps, a0, a1, b0, b1, start, c, row);
  multiply_tiles<PartsA, PartsB, 1, 1>(steps, a0, a1, b0, b1, start, c, row);
}

// `m` blocks of A's rows from a on, as the next lies a_next steps on, times `n` blocks of B's
// columns; m and n are 1 or 2. In line: to call a function takes up to a tenth of the time of a
// single step.
template <int PartsA, int PartsB>
[[gnu::always_inline]] static inline void multiply_blocks(Index steps, const bf16* a, Index m,
                                                          Index a_next, const bf16* b, Index n,
                                                          Index b_next, Start start, float* c,
                                                          Index row) {
  const bf16 *a1 = a + a_next * PartsA * tile_elements, *b1 = b + b_next * PartsB * tile_elements;
  if (m > 1 && n > 1)
    multiply_tiles<PartsA, PartsB, 2, 2>(steps, a, a1, b, b1, start, c, row);
  else
    multiply_edge<PartsA, PartsB>(steps, a, a1, m, b, b1, n, start, c, row);
}

// The same where both are packed whole: blocks from i on of A, and from j on of B.
template <int PartsA, int PartsB>
static inline void multiply_blocks(Packed<PartsA> a, Index i, Index m, Packed<PartsB> b, Index j,
                                   Index n, Start start, float* c, Index row) {
  multiply_blocks<PartsA, PartsB>(a.steps, a.tile(i, 0), m, a.steps, b.tile(j, 0), n, b.steps,
                                  start, c, row);
}

}  // namespace hyperfast::HF_ISA

#endif
