// Products along the rows of both operands: for few rows, or few outputs, lanes along the inputs.
#pragma once

#include "isa/product/tile.h"

namespace hyperfast::HF_ISA {

// Up to so many outputs, rows of x are multiplied by rows of weights (dot products along the
// inputs), as lanes along the outputs would be mostly empty.
constexpr Index few_outputs = 4;

// Up to so many rows of a task, turning its weight into panels costs more than it saves.
constexpr Index few_rows = 6;

// y[r][n] = init[r][n] + <a[r], b[n]> for N rows b of C, `b_row` apart. Rows of a are contiguous,
// in whatever type they are stored; one pass over them. `ahead` is the distance to what will be
// read next (0: unknown), fetched into the cache meanwhile.
template <int N, class C, class T>
static void dot_rows(Index rows, Index depth, const T* a, Index a_row, Index ahead, const C* b,
                     Index b_row, View<const C> init, View<C> y) {
  constexpr int w = width<C>;
  constexpr Index line = 64 / sizeof(T);
  // Of 16 bits the rest of a row is widened as a part of a vector (10,000 networks 24-64-6 of bf16,
  // a row each: 1.2 ms instead of 1.9); floats, and one or two numbers, are as fast one by one.
  constexpr bool in_parts = loads_halves_in_part && sizeof(T) == 2;
  const Index whole = depth / w * w, part = in_parts && depth - whole > 2 ? depth : whole;
  for (Index r = 0; r < rows; ++r, a += a_row) {
    Vec<C> acc[N] = {};
    for (Index i = 0; i < whole; i += w) {
      if (ahead && i % line == 0) prefetch(a + ahead + i);
      const Vec<C> v = load_wide(a + i);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[n] += v * load(b + n * b_row + i);
    }
    if (const int rest = int(part - whole)) {
      const Vec<C> v = load_wide_part(a + whole, rest);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[n] += v * load_part(b + n * b_row + whole, rest);
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      C s = sum<C>(acc[n]);
      for (Index i = part; i < depth; ++i) s += widen(a[i]) * b[n * b_row + i];
      y.data[r * y.row + n * y.col] = init.data ? init.data[r * init.row + n * init.col] + s : s;
    }
  }
}

// The same for any number n of rows of b; a.col == 1.
template <class C, class T>
static void dots(Index rows, Index n, Index depth, View<const T> a, const C* b, Index b_row,
                 View<const C> init, View<C> y, Index ahead = 0) {
  for (Index j = 0; j < n; j += 2, ahead = 0)
    (n - j > 1 ? dot_rows<2, C, T>
               : dot_rows<1, C, T>)(rows, depth, a.data, a.row, ahead, b + j * b_row, b_row,
                                    init.data ? init.at(0, j) : init, y.at(0, j));
}

}  // namespace hyperfast::HF_ISA
