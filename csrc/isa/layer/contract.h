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
  Index depth, rows;
  const C* h;
  const C* x;
  Index x_row;
  C* y;
  Index y_row;
};

template <int M, int V, StripUse use, class C>
static void strip(const Strip<C>& s, const LaneBlock<C>& b) {
  constexpr int w = width<C>;
  Vec<C> acc[M][V];
  const C* rows[M];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    rows[m] = s.weight + m * s.step;
    const Vec<C> start = (s.bias ? s.bias[m * s.bias_step] : C(0)) - Vec<C>{};
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[m][v] = start;
  }
  const C* ahead = s.weight + M * s.step;
  for (Index k = 0; k < b.depth; ++k) {
    Vec<C> hv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) hv[v] = load(b.h + k * lanes<C> + v * w);
    prefetch(ahead + k * M);  // the next M weights, if they follow
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const C a = rows[m][k * s.feature];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[m][v] += a * hv[v];
    }
  }
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

template <class C>
using StripOf = void (*)(const Strip<C>&, const LaneBlock<C>&);

template <class C, StripUse use, int M>
constexpr StripOf<C> pick_strip(int vecs) {
  if constexpr (tile_vecs == 4) {
    if (vecs == 4) return strip<M, 4, use, C>;
    if (vecs == 3) return strip<M, 3, use, C>;
  }
  return vecs == 2 ? strip<M, 2, use, C> : strip<M, 1, use, C>;
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

// n weights from s on, in strips of 6, 4, 2 and 1. Numbers of 16 bits are widened for each, once
// for all lanes.
template <class T, StripUse use>
static void strips(Index n, int vecs, Strip<T> s, LaneBlock<Acc<T>> b) {
  using C = Acc<T>;
  const auto steps = [&](Index height, StripOf<C> f) {
    for (; n >= height; n -= height) {
      if constexpr (std::is_same_v<T, C>)
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
  steps(6, pick_strip<C, use, 6>(vecs));
  steps(4, pick_strip<C, use, 4>(vecs));
  steps(2, pick_strip<C, use, 2>(vecs));
  steps(1, pick_strip<C, use, 1>(vecs));
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

// One block of tasks.
template <class T>
static void contract_block(const HyperLinear& p, const Acc<T>* shared, int vecs,
                           const LaneBlock<Acc<T>>& b) {
  using C = Acc<T>;
  if (p.vector.weight) {
    strips<T, StripUse::store>(p.out, vecs, strip_of<T>(p.vector, Transform::none, 0, 0, false), b);
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
      strips<T, StripUse::inputs>(p.in, vecs, strip_of<T>(p.matrix, p.transform, o, 0, true),
                                  at(0, o));
  else
    for (Index i = 0; i < p.in; ++i)
      strips<T, StripUse::outputs>(p.out, vecs, strip_of<T>(p.matrix, p.transform, 0, i, false),
                                   at(i, 0));
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
};

// Units of a block: as many as there are lanes, fewer where threads would be left without.
template <class C>
static Index block_units(Index count) {
  const Index blocks =
      max(ceil_div(count, lanes<C>), min(thread_count(), ceil_div(count, width<C>)));
  return max(round_up(ceil_div(count, max(blocks, 1)), width<C>), width<C>);
}

template <class T>
static void hyper_linear_contract(const HyperLinear& p, const Staged<const Acc<T>>& x,
                                  const Staged<Acc<T>>& y) {
  using C = Acc<T>;
  const Units all(p.groups);
  const C* shared = shared_bias<T>(p);
  const Index size = block_units<C>(all.count), x_row = p.in * lanes<C>, y_row = p.out * lanes<C>;
  const Index work = size * p.out * (p.in + 1) * (p.features + all.rows);
  parallel(
      ceil_div(all.count, size), max(parallel_work / max(work, 1), 1), [&](Index begin, Index end) {
        Units units(p.groups);
        C* h =
            scratch<C>(Slot::block, max(p.features * lanes<C> + units.rows * (x_row + y_row), 1));
        C* xs = h + p.features * lanes<C>;
        C* ys = xs + units.rows * x_row;
        for (Index b = begin; b < end; ++b) {
          const Index first = b * size, n = min(size, units.count - first);
          const T* features[lanes<C>];
          for (Index l = 0; l < n; ++l)
            features[l] = static_cast<const T*>(p.h.data) + units.task(first + l) * p.h.task;
          pack_lanes<C, T>(features, n, p.features, p.h.col, h, lanes<C>, lanes<C>);
          for (Index r = 0; r < units.rows; ++r) {
            const C* inputs[lanes<C>];
            for (Index l = 0; l < n; ++l) inputs[l] = units.row(x, first + l, r);
            pack_lanes<C, C>(inputs, n, p.in, x.col, xs + r * x_row, lanes<C>, lanes<C>);
          }
          contract_block<T>(p, shared, int(ceil_div(n, width<C>)),
                            {p.features, units.rows, h, xs, x_row, ys, y_row});
          // y is contiguous, be it the result or a copy.
          for (Index r = 0; r < units.rows; ++r)
            pack<C, C>(n, p.out, View<const C>{ys + r * y_row, 1, lanes<C>},
                       y.data + (first * units.rows + r) * p.out, units.rows * p.out, p.out);
        }
      });
}

}  // namespace hyperfast::HF_ISA
