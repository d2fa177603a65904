// Generate and apply where few rows share a task: the lanes are tasks, and the head is read as it
// lies, once for a block of them. A weight lives in a register from the moment it is generated
// until it has been multiplied by the inputs of its task's rows: none is ever stored, nothing
// packed. Where the rows of tasks differ in number (task_ids), every row is a task by itself: a
// lane.
#pragma once

#include "isa/layer/head.h"
#include "isa/simd/transform.h"

namespace hyperfast::HF_ISA {

// How a strip of M weights is used: those of M inputs of one output, y += w[m] * x[m]; those of M
// outputs of one input, y[m] += w[m] * x; or y[m] = w[m].
enum class StripUse { inputs, outputs, store };

template <class T>
struct Strip {
  const T* weight;
  Index step, feature;  // from one weight to the next, from one of its features to the next
  const T* bias;        // or null
  Index bias_step;
  Transform transform;
};

// What a strip reads and writes besides weights, in rows of `lanes<C>`: h (depth, lanes) and, for
// each of `rows` rows of the tasks, x (inputs, lanes) and y (outputs, lanes), so many elements from
// row to row.
template <class C>
struct LaneBlock {
  Index depth, rows;  // depth: features, of which h may hold pairs
  const C* h;
  const C* x;
  Index x_row;
  C* y;
  Index y_row;
};

// Features as a strip reads them: numbers of C, or pairs of bf16, at any address, and the last of
// an odd number by itself.
template <class T>
constexpr Index read_at_once = std::is_same_v<T, bf16> ? 2 : 1;
template <class C>
static inline C read_features(const C* from) {
  return *from;
}
static inline float read_features(const bf16* from) { return pair_at(from); }

template <int M, int V, StripUse use, class T>
static void strip(const Strip<T>& s, const LaneBlock<Acc<T>>& b) {
  using C = Acc<T>;
  using Step = std::conditional_t<std::is_same_v<T, C>, MultiplyAdd, AddPairs>;
  constexpr int w = width<C>;
  Vec<C> acc[M][V];
  const T* rows[M];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    rows[m] = s.weight + m * s.step;
    const Vec<C> start = (s.bias ? widen(s.bias[m * s.bias_step]) : C(0)) - Vec<C>{};
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[m][v] = start;
  }
  const C* h = b.h;
  const auto add = [&](auto step, const auto& entry) {
    Vec<C> hv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) hv[v] = load(h + v * w);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const C a = entry(rows[m]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) step.template step<C>(acc[m][v], a, hv[v]);
    }
    h += lanes<C>;
  };
  const T* ahead = s.weight + M * s.step;
  Index k = 0;
  for (; k + read_at_once<T> <= b.depth; k += read_at_once<T>) {
    prefetch(ahead + k * M);  // the next M weights, if they follow
    add(Step{}, [&](const T* row) { return read_features(row + k * s.feature); });
  }
  if (k < b.depth) add(MultiplyAdd{}, [&](const T* row) { return widen(row[k]); });
  if (s.transform != Transform::none) {
    C made[M * V * w];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(made + (m * V + v) * w, acc[m][v]);
    transform<C>(s.transform, M * V * w, made);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[m][v] = load(made + (m * V + v) * w);
  }
  const C* x = b.x;
  C* y = b.y;
  for (Index r = 0; r < b.rows; ++r, x += b.x_row, y += b.y_row) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if constexpr (use == StripUse::inputs) {
        Vec<C> sum = load(y + v * w);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) sum += acc[m][v] * load(x + m * lanes<C> + v * w);
        store(y + v * w, sum);
      } else {
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
          C* to = y + m * lanes<C> + v * w;
          store(to, use == StripUse::store ? acc[m][v] : load(to) + acc[m][v] * load(x + v * w));
        }
      }
    }
  }
}

template <class T>
using StripOf = void (*)(const Strip<T>&, const LaneBlock<Acc<T>>&);

template <class T, StripUse use, int M>
constexpr StripOf<T> pick_strip(int vecs) {
  if constexpr (tile_vecs == 4) {
    if (vecs == 4) return strip<M, 4, use, T>;
    if (vecs == 3) return strip<M, 3, use, T>;
  }
  return vecs == 2 ? strip<M, 2, use, T> : strip<M, 1, use, T>;
}

// The same M weights in C, one behind another.
template <class C, class T>
static Strip<C> widened(const Strip<T>& s, Index count, Index depth) {
  C* const to = scratch<C>(Slot::local_c, count * (depth + 1));
  C* const bias = to + count * depth;
  for (Index m = 0; m < count; ++m) {
    const T* const from = s.weight + m * s.step;
    if (s.feature == 1)
      convert(depth, from, to + m * depth);
    else
      for (Index k = 0; k < depth; ++k) to[m * depth + k] = widen(from[k * s.feature]);
    if (s.bias) bias[m] = widen(s.bias[m * s.bias_step]);
  }
  return {to, depth, 1, s.bias ? bias : nullptr, 1, s.transform};
}

// n weights from s on, in strips of 6, 4, 2 and 1, which read them as Read. Numbers of 16 bits are
// widened to that for each, once for all lanes. The last 8 are two strips of 4: one of 2 has too
// few sums to hide how long each takes.
template <class T, class Read, StripUse use>
static void strips(Index n, int vecs, Strip<T> s, LaneBlock<Acc<T>> b) {
  using C = Acc<T>;
  const auto steps = [&](Index height, StripOf<Read> f) {
    for (; n >= height && (n != 8 || height == 4); n -= height) {
      if constexpr (std::is_same_v<T, Read>)
        f(s, b);
      else
        f(widened<C>(s, height, b.depth), b);
      s.weight += height * s.step;
      if (s.bias) s.bias += height * s.bias_step;
      if (use == StripUse::inputs)
        b.x += height * lanes<C>;
      else
        b.y += height * lanes<C>;
    }
  };
  steps(6, pick_strip<Read, use, 6>(vecs));
  steps(4, pick_strip<Read, use, 4>(vecs));
  steps(2, pick_strip<Read, use, 2>(vecs));
  steps(1, pick_strip<Read, use, 1>(vecs));
}

template <class T>
static Strip<T> strip_of(const HeadMatrix& m, Transform transform, Index o, Index i,
                         bool along_inputs) {
  return {static_cast<const T*>(m.weight) + o * m.out_stride + i * m.in_stride,
          along_inputs ? m.in_stride : m.out_stride,
          m.feature,
          m.bias ? static_cast<const T*>(m.bias) + o * m.bias_out_stride + i * m.bias_in_stride
                 : nullptr,
          along_inputs ? m.bias_in_stride : m.bias_out_stride,
          transform};
}

// One block of tasks, whose strips read the head as Read.
template <class T, class Read>
static void contract_as(const HyperLinear& p, const Acc<T>* shared, int vecs,
                        const LaneBlock<Acc<T>>& b) {
  using C = Acc<T>;
  if (p.vector.weight) {
    strips<T, Read, StripUse::store>(p.out, vecs,
                                     strip_of<T>(p.vector, Transform::none, 0, 0, false), b);
  } else {
    for (Index j = 0; j < b.rows * b.y_row; ++j) b.y[j] = 0;
    for (Index r = 0; shared && r < b.rows; ++r)
      for (Index j = 0; j < b.y_row; ++j) b.y[r * b.y_row + j] = shared[j / lanes<C>];
  }
  const auto at = [&](Index input, Index output) {
    LaneBlock<C> part = b;
    part.x += input * lanes<C>;
    part.y += output * lanes<C>;
    return part;
  };
  // Strips run along the side whose weights follow one another in memory (in a layer that is turned
  // around, the outputs), unless it is too short to fill them.
  const bool by_inputs = p.matrix.in_stride <= p.matrix.out_stride;
  if (by_inputs ? p.in >= min(tile_rows, p.out) : p.out < min(tile_rows, p.in))
    for (Index o = 0; o < p.out; ++o)
      strips<T, Read, StripUse::inputs>(p.in, vecs, strip_of<T>(p.matrix, p.transform, o, 0, true),
                                        at(0, o));
  else
    for (Index i = 0; i < p.in; ++i)
      strips<T, Read, StripUse::outputs>(p.out, vecs,
                                         strip_of<T>(p.matrix, p.transform, 0, i, false), at(i, 0));
}

template <class T>
static void contract_block(const HyperLinear& p, const Acc<T>* shared, int vecs,
                           const LaneBlock<Acc<T>>& b) {
  if constexpr (may_pair<T>)
    if (pairs_of<T>(p.matrix.feature)) return contract_as<T, T>(p, shared, vecs, b);
  contract_as<T, Acc<T>>(p, shared, vecs, b);
}

// What the lanes are: tasks of `rows` rows each, or, ragged, the rows in the order in which they
// are staged.
struct Units {
  const Groups& groups;
  Index count, rows;
  Index piece_number = 0;

  explicit Units(const Groups& g)
      : groups(g), count(g.ragged ? g.rows : g.tasks), rows(g.ragged ? 1 : g.rows) {}

  // The task of a unit; units are asked for in rising order.
  Index task(Index unit) {
    if (!groups.ragged) return unit;
    while (unit >= groups.list[piece_number].end) ++piece_number;
    return groups.list[piece_number].task;
  }

  // Row r of a unit.
  template <class C>
  const C* row(const Staged<const C>& rows, Index unit, Index r) const {
    return rows.data + (groups.ragged ? unit * rows.row : unit * rows.task + r * rows.row);
  }
  // The same where it lies.
  template <class T>
  const T* row(const Rows& rows, Index unit, Index r) const {
    return static_cast<const T*>(rows.data) +
           (groups.ragged ? groups.order[unit] * rows.row : unit * rows.task + r * rows.row);
  }
};

// Units of a block: as many as there are lanes, fewer where threads would be left without.
template <class C>
static Index block_units(Index count, Index most = lanes<C>) {
  const Index blocks = round_up(max(ceil_div(count, most), 1), thread_count());
  return max(round_up(ceil_div(count, blocks), width<C>), width<C>);
}

// The features of units first, ..., first + n - 1, or pairs of them, as heads whose features are
// `feature` apart want them.
template <class T>
static void features_in_lanes(const TaskVector& h, Index features, Index feature, Units& units,
                              Index first, Index n, Acc<T>* to) {
  using C = Acc<T>;
  const T* from[lanes<C>];
  for (Index l = 0; l < n; ++l)
    from[l] = static_cast<const T*>(h.data) + units.task(first + l) * h.task;
  const Index whole = pairs_of<T>(feature) ? features / 2 * 2 : 0;
  if constexpr (may_pair<T>)
    if (whole == features && h.col == 1)  // they lie there
      return pack_pairs(from, nullptr, n, features, whole / 2, to);
  pack_lanes<C, T>(from, n, features, h.col, to, lanes<C>, lanes<C>);
  if constexpr (may_pair<T>) {
    join_rows(whole, lanes<C>, lanes<C>, to, to);
    if (whole && whole < features)  // the last one follows by itself
      std::memcpy(to + whole / 2 * lanes<C>, to + whole * lanes<C>, sizeof(C) * lanes<C>);
  }
}

// The inputs of a block: row(unit, r) is where those of a row begin, `step` apart.
template <class C, class F>
static void inputs_in_lanes(const LaneBlock<C>& b, Index first, Index n, Index in, Index step,
                            C* to, const F& row) {
  for (Index r = 0; r < b.rows; ++r) {
    decltype(row(first, r)) from[lanes<C>];
    for (Index l = 0; l < n; ++l) from[l] = row(first + l, r);
    pack_lanes<C>(from, n, in, step, to + r * b.x_row, lanes<C>, lanes<C>);
  }
}

// The outputs of n units: rows of `out` side by side.
template <class C>
static void outputs_from_lanes(const LaneBlock<C>& b, Index n, Index out, C* to) {
  for (Index r = 0; r < b.rows; ++r)
    pack<C, C>(n, out, {b.y + r * b.y_row, 1, lanes<C>}, to + r * out, b.rows * out, out);
}

// Calls body(units, first, n, block, x) for n units at a time, from `first` on, whose features are
// in the block; its y has room for the widest outputs of a layer, and x for the widest inputs.
template <class T, class F>
static void each_block(const Groups& groups, const TaskVector& h, Index features, Index feature,
                       Index params, Index in, Index out, const F& body) {
  using C = Acc<T>;
  const Units all(groups);
  const Index size = block_units<C>(all.count), x_size = all.rows * in * lanes<C>;
  const Index h_size = features * lanes<C>, work = size * params * (features + all.rows);
  parallel(
      ceil_div(all.count, size), max(parallel_work / max(work, 1), 1), [&](Index begin, Index end) {
        Units units(groups);
        C* const block =
            scratch<C>(Slot::block, max(h_size + x_size + all.rows * out * lanes<C>, 1));
        C *const x = block + h_size, *const y = x + x_size;
        for (Index i = begin; i < end; ++i) {
          const Index first = i * size, n = min(size, units.count - first);
          features_in_lanes<T>(h, features, feature, units, first, n, block);
          body(units, first, n,
               LaneBlock<C>{features, units.rows, block, x, in * lanes<C>, y, out * lanes<C>}, x);
        }
      });
}

template <class T>
static void hyper_linear_contract(const HyperLinear& p, const Staged<const Acc<T>>& x,
                                  const Staged<Acc<T>>& y) {
  using C = Acc<T>;
  const C* shared = shared_bias<T>(p);
  each_block<T>(p.groups, p.h, p.features, p.matrix.feature, p.out * (p.in + 1), p.in, p.out,
                [&](const Units& units, Index first, Index n, const LaneBlock<C>& b, C* inputs) {
                  inputs_in_lanes(b, first, n, p.in, x.col, inputs,
                                  [&](Index unit, Index r) { return units.row(x, unit, r); });
                  contract_block<T>(p, shared, int(ceil_div(n, width<C>)), b);
                  // y is contiguous, be it the result or a copy.
                  outputs_from_lanes(b, n, p.out, y.data + first * b.rows * p.out);
                });
}

}  // namespace hyperfast::HF_ISA
