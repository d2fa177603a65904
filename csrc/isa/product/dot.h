// Products along the rows of both operands: for few rows, or few outputs, lanes along the inputs.
#pragma once

#include "isa/product/tile.h"

namespace hyperfast::HF_ISA {

// Up to so many outputs, rows of x are multiplied by rows of weights (dot products along the
// inputs), as lanes along the outputs would be mostly empty.
constexpr Index few_outputs = 4;

// Up to so many rows of a task, turning its weight into panels costs more than it saves.
constexpr Index few_rows = 6;

// y[r][n] = init[r][n] + <a[r], b[n]> for N rows b of C, `b_row` apart, and a multiple of R rows of
// a, which are contiguous, in whatever type they are stored; one pass over them. R rows at once
// keep as many sums on their way, and of as many as a vector has lanes, one pass over the lanes
// ends them all. `ahead` is the distance to what will be read next (0: unknown), fetched into the
// cache meanwhile, where rows come one by one.
template <int R, int N, class C, class T>
static void dot_rows(Index rows, Index depth, const T* a, Index a_row, Index ahead, const C* b,
                     Index b_row, View<const C> init, View<C> y) {
  constexpr int w = width<C>;
  constexpr Index line = 64 / sizeof(T);
  // Of 16 bits the rest of a row is widened as a part of a vector (10,000 networks 24-64-6 of bf16,
  // a row each: 1.2 ms instead of 1.9); floats, and one or two numbers, are as fast one by one.
  constexpr bool in_parts = loads_halves_in_part && sizeof(T) == 2;
  const Index whole = depth / w * w, part = in_parts && depth - whole > 2 ? depth : whole;
  for (Index r = 0; r < rows; r += R, a += R * a_row) {
    Vec<C> acc[R * N] = {};
    for (Index i = 0; i < whole; i += w) {
      Vec<C> bv[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) bv[n] = load(b + n * b_row + i);
#pragma GCC unroll 16
      for (int m = 0; m < R; ++m) {
        if constexpr (R == 1)
          if (ahead && i % line == 0) prefetch(a + ahead + i);
        const Vec<C> v = load_wide(a + m * a_row + i);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[m * N + n] += v * bv[n];
      }
    }
    if (const int rest = int(part - whole)) {
#pragma GCC unroll 16
      for (int m = 0; m < R; ++m) {
        const Vec<C> v = load_wide_part(a + m * a_row + whole, rest);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[m * N + n] += v * load_part(b + n * b_row + whole, rest);
      }
    }
    C s[R * N];
    if constexpr (R * N == w) {
      store(s, sums<C>(acc));
    } else {
      for (int j = 0; j < R * N; ++j) s[j] = sum<C>(acc[j]);
    }
    for (int m = 0; m < R; ++m)
      for (int n = 0; n < N; ++n) {
        C v = s[m * N + n];
        for (Index i = part; i < depth; ++i) v += widen(a[m * a_row + i]) * b[n * b_row + i];
        y.data[(r + m) * y.row + n * y.col] = init.data ? *init.at(r + m, n).data + v : v;
      }
  }
}

// The same for any number of rows of a, and N of b.
template <int N, class C, class T>
static void dots(Index rows, Index depth, View<const T> a, const C* b, Index b_row,
                 View<const C> init, View<C> y, Index ahead) {
  // What is fetched ahead comes from memory, for which one row at a time is fast enough; several
  // longer rows would share a few places of the first-level cache. With 16 registers a network
  // 64-64-10 of 64 features is made in 0.8 of the time, one of 512 features in 0.6; with 32, where
  // these are rows enough to run out of registers for their addresses, it was not measured.
  constexpr Index together = many_registers ? 1 : width<C> / N, longest = 512;
  const Index some = together == 1 || ahead || depth > longest ? 0 : rows / together * together;
  dot_rows<together, N, C, T>(some, depth, a.data, a.row, ahead, b, b_row, init, y);
  dot_rows<1, N, C, T>(rows - some, depth, a.at(some, 0).data, a.row, ahead, b, b_row,
                       init.data ? init.at(some, 0) : init, y.at(some, 0));
}

// The same for any number n of rows of b; a.col == 1.
template <class C, class T>
static void dots(Index rows, Index n, Index depth, View<const T> a, const C* b, Index b_row,
                 View<const C> init, View<C> y, Index ahead = 0) {
  for (Index j = 0; j < n; j += 2, ahead = 0)
    (n - j > 1 ? dots<2, C, T> : dots<1, C, T>)(rows, depth, a, b + j * b_row, b_row,
                                                init.data ? init.at(0, j) : init, y.at(0, j),
                                                ahead);
}

}  // namespace hyperfast::HF_ISA
