// Rows as every hyper kernel wants them: in the accumulation type, those of a task next to each
// other.
#pragma once

#include "isa/rows/pieces.h"

namespace hyperfast::HF_ISA {

template <class C>
struct Staged {
  C* data;
  Index task, row, col;

  View<C> of(const Piece& p) const { return {data + p.task * task + p.begin * row, row, col}; }
};

template <class T>
static bool in_place(const Groups& g) {
  return std::is_same_v<T, Acc<T>> && !g.ragged;
}

static inline Index total_rows(const Groups& g) { return g.ragged ? g.rows : g.tasks * g.rows; }

// Where rows of `columns` elements go: the tensor itself, or a copy in the slot.
template <class T>
static Staged<Acc<T>> place(const Rows& rows, const Groups& g, Index columns, Slot slot) {
  using C = Acc<T>;
  if (in_place<T>(g)) return {static_cast<C*>(rows.data), rows.task, rows.row, rows.col};
  C* copy = scratch<C>(slot, max(total_rows(g) * columns, 1));
  return {copy, g.ragged ? 0 : g.rows * columns, columns, 1};
}

// Rows of `columns` elements one behind another, in their natural order.
static inline Rows dense_rows(void* data, const Groups& g, Index columns) {
  return {data, g.ragged ? 0 : g.rows * columns, columns, 1};
}

template <class T, class F>
static void each_row(const Rows& rows, const Groups& g, Index columns, const F& body) {
  parallel(total_rows(g), max(parallel_work / max(columns, 1), 1), [&](Index first, Index last) {
    for (Index j = first; j < last; ++j) {
      T* data = static_cast<T*>(rows.data);
      data += g.ragged ? g.order[j] * rows.row : j / g.rows * rows.task + j % g.rows * rows.row;
      body(data, j * columns);
    }
  });
}

template <class T>
static Staged<const Acc<T>> stage(const Rows& rows, const Groups& g, Index columns, Slot slot) {
  const Staged<Acc<T>> to = place<T>(rows, g, columns, slot);
  if (!in_place<T>(g))
    each_row<T>(rows, g, columns, [&](const T* from, Index at) {
      if (rows.col == 1) return convert(columns, from, to.data + at);
      for (Index i = 0; i < columns; ++i) to.data[at + i] = widen(from[i * rows.col]);
    });
  return {to.data, to.task, to.row, to.col};
}

// The way back, after the rows have been written; rows.col == 1.
template <class T>
static void unstage(const Staged<Acc<T>>& from, const Rows& rows, const Groups& g, Index columns) {
  if (!in_place<T>(g))
    each_row<T>(rows, g, columns, [&](T* to, Index at) { convert(columns, from.data + at, to); });
}

}  // namespace hyperfast::HF_ISA
