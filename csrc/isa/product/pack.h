// Matrices by their strides, and copies of them with lanes side by side.
#pragma once

#include "isa/common.h"
#include "isa/simd/vector.h"

namespace hyperfast::HF_ISA {

template <class T>
struct View {
  T* data;
  Index row, col;

  View<T> transposed() const { return {data, col, row}; }
  View<T> at(Index i, Index j) const { return {data + i * row + j * col, row, col}; }
};

// n elements rounded up to cache lines; to an odd number of many, so that the lines of a column of
// vectors do not fall into the same set of the cache.
template <class C>
static inline Index odd_lines(Index n) {
  constexpr Index line = 64 / Index(sizeof(C));
  const Index lines = ceil_div(n, line);
  return (lines > 8 ? lines | 1 : lines) * line;
}

// dst[k][l] = src(k, l) for k < depth, l < n; zeros for n <= l < all. Widens to C on the way.
template <class C, class T>
static void pack(Index depth, Index n, View<const T> src, C* dst, Index dst_row, Index all) {
  constexpr int w = width<C>;
  const bool direct = src.col == 1;
  const bool transposed = src.row == 1;
  const Index whole_n = direct || transposed ? n / w * w : 0;
  const Index whole_k = direct ? depth : transposed ? depth / w * w : 0;
  for (Index k = 0; direct && k < depth; ++k)  // row by row: they may be pages apart
    for (Index l = 0; l < whole_n; l += w)
      store(dst + k * dst_row + l, load_wide(src.data + k * src.row + l));
  if (!direct)
    for (Index l = 0; l < whole_n; l += w)
      for (Index k = 0; k < whole_k; k += w) {
        Vec<C> block[w];
#pragma GCC unroll 16
        for (int i = 0; i < w; ++i) block[i] = load_wide(src.data + k + (l + i) * src.col);
        transpose<C>(block);
#pragma GCC unroll 16
        for (int i = 0; i < w; ++i) store(dst + (k + i) * dst_row + l, block[i]);
      }
  for (Index k = 0; k < depth; ++k) {
    const Index first = k < whole_k ? whole_n : 0;
    for (Index l = first; l < n; ++l)
      dst[k * dst_row + l] = widen(src.data[k * src.row + l * src.col]);
    for (Index l = n; l < all; ++l) dst[k * dst_row + l] = 0;
  }
}

// dst[k][l] = src[l][k * step] for k < depth, l < n; zeros for n <= l < all. Rows of dst are
// dst_row apart.
template <class C, class T>
static void pack_lanes(const T* const* src, Index n, Index depth, Index step, C* dst, Index dst_row,
                       Index all) {
  constexpr int w = width<C>;
  Index l = 0;
  for (; step == 1 && l + w <= n; l += w) {
    Index k = 0;
    for (; k + w <= depth; k += w) {
      Vec<C> block[w];
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) block[i] = load_wide(src[l + i] + k);
      transpose<C>(block);
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) store(dst + (k + i) * dst_row + l, block[i]);
    }
    for (; k < depth; ++k)
      for (int i = 0; i < w; ++i) dst[k * dst_row + l + i] = widen(src[l + i][k]);
  }
  for (; l < n; ++l)
    for (Index k = 0; k < depth; ++k) dst[k * dst_row + l] = widen(src[l][k * step]);
  for (; l < all; ++l)
    for (Index k = 0; k < depth; ++k) dst[k * dst_row + l] = 0;
}

}  // namespace hyperfast::HF_ISA
