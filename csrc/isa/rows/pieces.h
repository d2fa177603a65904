// Walking over the rows of tasks: pieces of a batch, and their rows as a matrix.
#pragma once

#include "isa/product/tile.h"
#include "isa/simd/stretch.h"

namespace hyperfast::HF_ISA {

// Items of work for which handing a piece to another thread pays: about 20 us of multiply-adds.
constexpr Index parallel_work = 1 << 17;

static inline Piece piece(const Groups& g, Index i) {
  if (g.ragged) return g.list[i];
  if (g.per_task == 1) return {i, 0, g.rows};
  const Index begin = i % g.per_task * g.cut;
  return {i / g.per_task, begin, min(begin + g.cut, g.rows)};
}

template <class T>
static inline T* row_data(const Rows& rows, const Groups& g, const Piece& p, Index position) {
  return static_cast<T*>(rows.data) + p.task * rows.task +
         (g.ragged ? g.order[position] : position) * rows.row;
}

// Whether the rows of a task follow one another without a gap.
static inline bool side_by_side(const Rows& rows, const Groups& g, Index columns) {
  return !g.ragged && rows.col == 1 && rows.row == columns;
}

// The rows of a piece as a matrix of Acc<T>: in place when they lie so, else copied to the slot.
template <class T>
static View<const Acc<T>> gather(const Rows& rows, const Groups& g, const Piece& p, Index columns,
                                 Slot slot) {
  using C = Acc<T>;
  if constexpr (std::is_same_v<C, T>)
    if (!g.ragged || p.end - p.begin == 1)
      return {row_data<T>(rows, g, p, p.begin), rows.row, rows.col};
  C* copy = scratch<C>(slot, max((p.end - p.begin) * columns, 1));
  if (side_by_side(rows, g, columns)) {
    convert((p.end - p.begin) * columns, row_data<T>(rows, g, p, p.begin), copy);
    return {copy, columns, 1};
  }
  for (Index j = p.begin; j < p.end; ++j) {
    const T* from = row_data<T>(rows, g, p, j);
    C* to = copy + (j - p.begin) * columns;
    if (rows.col == 1)
      convert(columns, from, to);
    else
      for (Index i = 0; i < columns; ++i) to[i] = widen(from[i * rows.col]);
  }
  return {copy, columns, 1};
}

// The same with contiguous rows of `columns` elements each.
template <class C>
static View<const C> compact(View<const C> rows, Index m, Index columns, Slot slot) {
  C* copy = scratch<C>(slot, max(m * columns, 1));
  for (Index j = 0; j < m; ++j)
    for (Index i = 0; i < columns; ++i)
      copy[j * columns + i] = rows.data[j * rows.row + i * rows.col];
  return {copy, columns, 1};
}

// Rows of bf16 as pairs, a 0 behind an odd number of elements: in place where pairs are aligned.
static View<const float> gather_pairs(const Rows& rows, const Groups& g, const Piece& p,
                                      Index columns, Slot slot) {
  const bf16* const first = row_data<bf16>(rows, g, p, p.begin);
  const bool even = columns % 2 == 0 && rows.row % 2 == 0 && holds_pairs(first);
  if (even && rows.col == 1 && !g.ragged)
    return {reinterpret_cast<const float*>(first), rows.row / 2, 1};
  const Index row = round_up(columns, 2);
  bf16* const copy = scratch<bf16>(slot, max((p.end - p.begin) * row, 1));
  for (Index j = p.begin; j < p.end; ++j) {
    const bf16* const from = row_data<bf16>(rows, g, p, j);
    bf16* const to = copy + (j - p.begin) * row;
    if (rows.col == 1)
      std::memcpy(to, from, std::size_t(columns) * sizeof(bf16));
    else
      for (Index i = 0; i < columns; ++i) to[i] = from[i * rows.col];
    if (columns < row) to[columns] = {};
  }
  return {reinterpret_cast<const float*>(copy), row / 2, 1};
}

// Writes y (+ bias) to the rows of a piece; rows.col == 1.
template <class T>
static void scatter(const Rows& rows, const Groups& g, const Piece& p, Index columns,
                    const Acc<T>* y, const T* bias, Index bias_col) {
  if (!bias && side_by_side(rows, g, columns))
    return convert((p.end - p.begin) * columns, y, row_data<T>(rows, g, p, p.begin));
  for (Index j = p.begin; j < p.end; ++j, y += columns) {
    T* to = row_data<T>(rows, g, p, j);
    if (bias)
      for (Index i = 0; i < columns; ++i) to[i] = narrow<T>(y[i] + widen(bias[i * bias_col]));
    else
      convert(columns, y, to);
  }
}

template <class F>
static void with_type(Dtype dtype, const F& body) {
  switch (dtype) {
    case Dtype::f64: return body(double{});
    case Dtype::f32: return body(float{});
    case Dtype::bf16: return body(bf16{});
    case Dtype::f16: return body(f16{});
  }
}

// to (size) is the sum of so many parts, rounded once.
template <class T>
static void add_up(Index n, Index size, const Acc<T>* parts, T* to) {
  parallel(size, parallel_work / 8, [&](Index begin, Index end) {
    constexpr Index few = 512;
    for (Index j = begin; j < end; j += few) {
      Acc<T> sum[few];
      const Index some = min(few, end - j);
      for (Index l = 0; l < some; ++l) sum[l] = parts[j + l];
      for (Index i = 1; i < n; ++i)
        for (Index l = 0; l < some; ++l) sum[l] += parts[i * size + j + l];
      for (Index l = 0; l < some; ++l) to[j + l] = narrow<T>(sum[l]);
    }
  });
}

}  // namespace hyperfast::HF_ISA
