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

// A block of up to w x w elements turned around: `rows` of them, `src_row` apart, become columns.
template <class C, class T>
static inline void turn_block(int rows, int columns, const T* src, Index src_row, C* dst,
                              Index dst_row) {
  constexpr int w = width<C>;
  Vec<C> block[w];
  if constexpr (std::is_same_v<C, T>) {
    if (2 * columns <= w && rows == w) {  // 32 shuffles instead of 64
      Vec<C> half[w / 2];
#pragma GCC unroll 8
      for (int i = 0; i < w / 2; ++i)
        half[i] = low_halves<C>(load_part(src + i * src_row, columns),
                                load_part(src + (i + w / 2) * src_row, columns),
                                std::make_integer_sequence<int, w>{});
      transpose_halves<C>(half);
      for (int i = 0; i < columns; ++i) store(dst + i * dst_row, half[i]);
      return;
    }
    if (rows < w || columns < w) {
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i)
        block[i] = i < rows ? load_part(src + i * src_row, columns) : Vec<C>{};
      transpose<C>(block);
      for (int i = 0; i < columns; ++i) store_part(dst + i * dst_row, block[i], rows);
      return;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < w; ++i) block[i] = load_wide(src + i * src_row);
  transpose<C>(block);
#pragma GCC unroll 16
  for (int i = 0; i < w; ++i) store(dst + i * dst_row, block[i]);
}

// n pairs that lie side by side (coordinates, say) become two rows.
template <class C, int... I>
static void part_pairs(Index n, const C* src, C* dst, Index dst_row,
                       std::integer_sequence<int, I...>) {
  constexpr int w = width<C>;
  Index l = 0;
  for (; l + w <= n; l += w) {
    const Vec<C> a = load(src + 2 * l), b = load(src + 2 * l + w);
    store(dst + l, __builtin_shufflevector(a, b, (2 * I)...));
    store(dst + dst_row + l, __builtin_shufflevector(a, b, (2 * I + 1)...));
  }
  for (; l < n; ++l)
    for (int k = 0; k < 2; ++k) dst[k * dst_row + l] = src[2 * l + k];
}

// Rows 2 k and 2 k + 1 of lanes, rounded to bf16, become row k, of pairs. `to` may be `from`.
static inline void join_rows(Index depth, Index n, Index row, const float* from, float* to) {
  for (Index k = 0; k < depth; k += 2)
    for (Index l = 0; l < n; l += width<float>) {
      const auto first = nearest_bf16(load(from + k * row + l));
      const auto second = nearest_bf16(load(from + (k + 1) * row + l));
      store(to + k / 2 * row + l, bit_cast<VecF>(first >> 16 | (second & 0xffff0000)));
    }
}

// The way back: row k, of pairs, becomes rows 2 k and 2 k + 1 of `depth`. It may be one of their
// second half.
static inline void part_rows(Index depth, Index n, Index row, const float* from, float* to) {
  for (Index k = 0; k < depth; k += 2, from += row)
    for (Index l = 0; l < n; l += width<float>) {
      const auto pair = bit_cast<Vec<std::uint32_t>>(load(from + l));
      store(to + k * row + l, bit_cast<VecF>(pair << 16));
      if (k + 1 < depth) store(to + (k + 1) * row + l, bit_cast<VecF>(pair & 0xffff0000));
    }
}

// dst[k][l] = src(k, l) for k < depth, l < n; zeros for n <= l < all. Widens to C on the way.
template <class C, class T>
static void pack(Index depth, Index n, View<const T> src, C* dst, Index dst_row, Index all) {
  constexpr int w = width<C>;
  constexpr bool same = std::is_same_v<C, T>;
  // Blocks that are not whole take as long, and stretches of less than 4 longer than one by one.
  constexpr Index least = same ? 4 : w;
  const auto turned = [](Index size) { return size % w < least ? size / w * w : size; };
  for (Index k = 0; n < all && k < depth; ++k)
    for (Index l = n; l < all; ++l) dst[k * dst_row + l] = 0;
  Index whole_n = 0, whole_k = 0;
  if (src.col == 1) {  // row by row: they may be pages apart
    whole_n = n / w * w, whole_k = depth;
    for (Index k = 0; k < depth; ++k)
      for (Index l = 0; l < whole_n; l += w)
        store(dst + k * dst_row + l, load_wide(src.data + k * src.row + l));
  } else if (src.row == 1) {
    if constexpr (same)
      if (depth == 2 && src.col == 2)
        return part_pairs<C>(n, src.data, dst, dst_row, std::make_integer_sequence<int, w>{});
    whole_n = turned(n), whole_k = turned(depth);
    for (Index l = 0; l < whole_n; l += w)
      for (Index k = 0; k < whole_k; k += w)
        turn_block<C, T>(int(min(w, whole_n - l)), int(min(w, whole_k - k)),
                         src.data + k + l * src.col, src.col, dst + k * dst_row + l, dst_row);
  }
  for (Index k = 0; k < depth; ++k)
    for (Index l = k < whole_k ? whole_n : 0; l < n; ++l)
      dst[k * dst_row + l] = widen(src.data[k * src.row + l * src.col]);
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
