// All layers of one network for a few hundred of its rows at a time, whose hidden layers stay in
// the second-level cache.
#pragma once

#include "isa/network/activate.h"
#include "isa/network/few.h"
#include "isa/network/many.h"

namespace hyperfast::HF_ISA {

// Rows at a time, of whole vectors: a layer's values take so many bytes at most.
template <class C>
static Index chunk_rows(const Net& net, Index bytes) {
  const Index rows = bytes / Index(sizeof(C)) / net.widest / lanes<C> * lanes<C>;
  return min(max(rows, 4 * lanes<C>), 512);
}

// Whether a mode turns rows of T around as pairs.
template <class T, class Mode>
constexpr bool turns_pairs = std::is_same_v<T, bf16> && std::is_same_v<Mode, Many<float>>;

// The rows of a piece as a mode (few.h, many.h) holds them: in place, in the slot, or in `to`; and
// the way back to contiguous ones.
template <class T, class Mode>
static const Acc<T>* take_rows(const Mode& mode, const Rows& rows, const Groups& groups,
                               const Piece& q, Index columns, Slot slot, Acc<T>* to) {
  if constexpr (turns_pairs<T, Mode>)
    return mode.take_apart(gather_pairs(rows, groups, q, columns, slot), columns, to);
  else
    return mode.take(gather<T>(rows, groups, q, columns, slot), columns, to);
}
// The same as pairs, where the first of the weights are pairs.
template <class T, class Mode, class W>
static const Acc<T>* take_rows(const Mode& mode, const Weights<W>& weights, const Rows& rows,
                               const Groups& groups, const Piece& q, Index columns, Slot slot,
                               Acc<T>* to) {
  if constexpr (turns_pairs<T, Mode>)
    if (weights.first_pairs)
      return mode.take_pairs(gather_pairs(rows, groups, q, columns, slot), columns, to);
  return take_rows<T>(mode, rows, groups, q, columns, slot, to);
}
template <class T, class Mode>
static void give_rows(const Mode& mode, const Rows& rows, const Groups& groups, const Piece& q,
                      Index columns, const Acc<T>* from) {
  using C = Acc<T>;
  if (in_place<T>(groups))
    return mode.give(from, columns, reinterpret_cast<C*>(row_data<T>(rows, groups, q, q.begin)));
  if constexpr (turns_pairs<T, Mode>)
    if (columns % 2 == 0 && side_by_side(rows, groups, columns)) {
      bf16* const to = row_data<T>(rows, groups, q, q.begin);
      if (holds_pairs(to)) return mode.give_pairs(from, columns / 2, reinterpret_cast<C*>(to));
    }
  C* const copy = scratch<C>(Slot::local_a, (q.end - q.begin) * columns);
  mode.give(from, columns, copy);
  scatter<T>(rows, groups, q, columns, copy, nullptr, 0);
}

// What all networks of a call have in common.
struct RowsOfNetworks {
  const Net& net;
  const Groups& groups;
  Rows x, y;
  void* preactivations;  // or null
};

template <class T, class Mode, class W>
static void run_part(const Mode& mode, const RowsOfNetworks& p, const Piece& q, Weights<W> weights,
                     Index ahead) {
  using C = Acc<T>;
  const Index most = mode.size(p.net.widest), rows = total_rows(p.groups);
  C* const spare = scratch<C>(Slot::block, 2 * most);
  T* kept = static_cast<T*>(p.preactivations);
  const C* x = take_rows<T>(mode, weights, p.x, p.groups, q, p.net.layers[0].in, Slot::local_d,
                            spare + most);
  for (Index n = 0; n < p.net.count; ++n) {
    const Layer& l = p.net.layers[n];
    C* const y = spare + n % 2 * most;
    const auto own = weights.template take<C>(l);
    if (kept && l.kept) {
      mode.apply(l, own, ahead, x, y);
      give_rows<T>(mode, dense_rows(kept, p.groups, l.out), p.groups, q, l.out, y);
      kept += rows * l.out;
      mode.activate(l, y, nullptr);
    } else {
      mode.apply_activated(l, own, ahead, x, y, nullptr);
    }
    x = y;
  }
  give_rows<T>(mode, p.y, p.groups, q, p.net.layers[p.net.count - 1].out, x);
}

// What one part of the rows writes, and the next one reads, if there is one.
template <class T>
static Ahead ahead_of(const RowsOfNetworks& p, const Piece& part, const Piece& next) {
  Ahead ahead;
  const T* kept = static_cast<const T*>(p.preactivations);
  for (Index n = 0; kept && n < p.net.count; ++n) {
    const Layer& l = p.net.layers[n];
    if (!l.kept) continue;
    ahead.add_rows<T>(dense_rows(const_cast<T*>(kept), p.groups, l.out), p.groups, part, l.out);
    kept += total_rows(p.groups) * l.out;
  }
  ahead.add_rows<T>(p.y, p.groups, part, p.net.layers[p.net.count - 1].out);
  ahead.add_rows<T>(p.x, p.groups, next, p.net.layers[0].in);
  return ahead;
}

// The rows of one piece through its network. `next` is the piece that follows, or empty, and
// `ahead` the distance to its weights, or 0.
template <class T, class W>
static void run_piece(const RowsOfNetworks& p, const Piece& q, Weights<W> weights, Index ahead,
                      const Piece& next) {
  using C = Acc<T>;
  const Index m = q.end - q.begin;
  if (m <= few_rows && !p.net.transforms) return run_part<T>(Few<W, C>{m}, p, q, weights, ahead);
  const bool pairs = m > few_rows && first_in_pairs<T, W>(p.net);
  const Weights<C> plain = plain_weights<C>(p.net, weights, pairs);
  if (m <= few_rows) return run_part<T>(Few<C, C>{m}, p, q, plain, 0);
  const Index chunk = chunk_rows<C>(p.net, 64 << 10);
  for (Index r = q.begin; r < q.end; r += chunk) {
    const Piece part{q.task, r, min(r + chunk, q.end)};
    const bool last = part.end == q.end;
    const Piece then = last ? next : Piece{q.task, part.end, min(part.end + chunk, q.end)};
    Ahead soon = ahead_of<T>(p, part, then);
    if (last && ahead) soon.add(weights.data + ahead, p.net.params * Index(sizeof(W)));
    run_part<T>(Many<C>(part.end - part.begin, soon), p, part, plain, 0);
  }
}

}  // namespace hyperfast::HF_ISA
