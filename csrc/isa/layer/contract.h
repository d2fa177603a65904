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

// What is fetched meanwhile: a line at every step, so many bytes behind the one before.
struct Fetch {
  const void* from;
  Index step;
};

// What a strip reads and writes besides weights, in rows of `row` lanes, of which `vecs` vectors
// are in use: h (depth, row), x (inputs, rows, row) and y (outputs, rows, row), of `rows` rows of
// the tasks. All rows of an input lie side by side: apart, at powers of two, they would evict each
// other from the cache.
template <class C>
struct LaneBlock {
  Index depth, rows;  // depth: features, of which h may hold pairs
  Index row;
  int vecs;
  const C* h;
  const C* x;
  C* y;

  Index step() const { return rows * row; }  // from one input or output to the next
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

// V vectors from `lane` on.
template <int M, int V, StripUse use, class T>
static void strip(const Strip<T>& s, const LaneBlock<Acc<T>>& b, Index lane, Fetch fetch) {
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
  const Index row = b.row;
  const C* h = b.h + lane;
  const char* ahead = static_cast<const char*>(fetch.from);
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
    h += row;
  };
  const Index feature = s.feature;
  Index k = 0;
  for (; k + read_at_once<T> <= b.depth; k += read_at_once<T>) {
    prefetch(ahead);
    ahead += fetch.step;
    add(Step{}, [&](const T* from) { return read_features(from + k * feature); });
  }
  if (k < b.depth) add(MultiplyAdd{}, [&](const T* from) { return widen(from[k]); });
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
  const Index next = b.step();
  const C* x = b.x + lane;
  C* y = b.y + lane;
  for (Index r = 0; r < b.rows; ++r, x += row, y += row) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if constexpr (use == StripUse::inputs) {
        Vec<C> sum = load(y + v * w);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) sum += acc[m][v] * load(x + m * next + v * w);
        store(y + v * w, sum);
      } else {
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
          C* to = y + m * next + v * w;
          store(to, use == StripUse::store ? acc[m][v] : load(to) + acc[m][v] * load(x + v * w));
        }
      }
    }
  }
}

template <class T>
using StripOf = void (*)(const Strip<T>&, const LaneBlock<Acc<T>>&, Index lane, Fetch);

template <class T, StripUse use, int M>
constexpr StripOf<T> pick_strip(int vecs) {
  if constexpr (tile_vecs == 4) {
    if (vecs >= 4) return strip<M, 4, use, T>;
    if (vecs == 3) return strip<M, 3, use, T>;
  }
  return vecs >= 2 ? strip<M, 2, use, T> : strip<M, 1, use, T>;
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

// n weights from s on, in strips of 6, 4, 2 and 1, which read them as Read. A strip is used for all
// lanes before the next, whose weights are fetched meanwhile, if they follow. Numbers of 16 bits
// are widened for it, once for all. The last 8 are two strips of 4: one of 2 has too few sums to
// hide how long each takes.
template <class T, class Read, StripUse use>
static void strips(Index n, Strip<T> s, LaneBlock<Acc<T>> b) {
  using C = Acc<T>;
  const auto steps = [&](auto height) {
    constexpr int M = height;
    const auto use_strip = [&](const Strip<Read>& weights) {
      Fetch fetch{s.weight + M * s.step, M * Index(sizeof(T)) * read_at_once<Read>};
      for (int v = 0; v < b.vecs; v += tile_vecs) {
        pick_strip<Read, use, M>(b.vecs - v)(weights, b, v * width<C>, fetch);
        fetch.step = 0;  // it is there
      }
    };
    for (; n >= M && (n != 8 || M == 4); n -= M) {
      if constexpr (std::is_same_v<T, Read>)
        use_strip(s);
      else
        use_strip(widened<C>(s, M, b.depth));
      s.weight += M * s.step;
      if (s.bias) s.bias += M * s.bias_step;
      if (use == StripUse::inputs)
        b.x += M * b.step();
      else
        b.y += M * b.step();
    }
  };
  steps(std::integral_constant<int, 6>{});
  steps(std::integral_constant<int, 4>{});
  steps(std::integral_constant<int, 2>{});
  steps(std::integral_constant<int, 1>{});
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
static void contract_as(const HyperLinear& p, const Acc<T>* shared, const LaneBlock<Acc<T>>& b) {
  using C = Acc<T>;
  if (p.vector.weight) {
    strips<T, Read, StripUse::store>(p.out, strip_of<T>(p.vector, Transform::none, 0, 0, false), b);
  } else {
    for (Index o = 0; o < p.out; ++o)
      for (Index j = 0; j < b.step(); ++j) b.y[o * b.step() + j] = shared ? shared[o] : C(0);
  }
  const auto at = [&](Index input, Index output) {
    LaneBlock<C> part = b;
    part.x += input * b.step();
    part.y += output * b.step();
    return part;
  };
  // Strips run along the side whose weights follow one another in memory (in a layer that is turned
  // around, the outputs), unless it is too short to fill them.
  const bool by_inputs = p.matrix.in_stride <= p.matrix.out_stride;
  if (by_inputs ? p.in >= min(tile_rows, p.out) : p.out < min(tile_rows, p.in))
    for (Index o = 0; o < p.out; ++o)
      strips<T, Read, StripUse::inputs>(p.in, strip_of<T>(p.matrix, p.transform, o, 0, true),
                                        at(0, o));
  else
    for (Index i = 0; i < p.in; ++i)
      strips<T, Read, StripUse::outputs>(p.out, strip_of<T>(p.matrix, p.transform, 0, i, false),
                                         at(i, 0));
}

template <class T>
static void contract_block(const HyperLinear& p, const Acc<T>* shared, const LaneBlock<Acc<T>>& b) {
  if constexpr (may_pair<T>)
    if (pairs_of<T>(p.matrix.feature)) return contract_as<T, T>(p, shared, b);
  contract_as<T, Acc<T>>(p, shared, b);
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

// Lanes of a block: several tiles of them where vectors are short. So a strip of weights is read
// from the first-level cache by all but the first, and the head streamed once for 64 floats on any
// machine.
template <class C>
constexpr Index block_lanes = max(256 / Index(sizeof(C)), lanes<C>);

// Units of a block: as many as there are lanes, fewer where threads would be left without.
template <class C>
static Index block_units(Index count) {
  const Index blocks = round_up(max(ceil_div(count, block_lanes<C>), 1), thread_count());
  return max(round_up(ceil_div(count, blocks), width<C>), width<C>);
}

// The features of units first, ..., first + n - 1, or pairs of them, as heads whose features are
// `feature` apart want them, in rows of `row` lanes.
template <class T>
static void features_in_lanes(const TaskVector& h, Index features, Index feature, Units& units,
                              Index first, Index n, Index row, Acc<T>* to) {
  using C = Acc<T>;
  const T* from[block_lanes<C>];
  for (Index l = 0; l < n; ++l)
    from[l] = static_cast<const T*>(h.data) + units.task(first + l) * h.task;
  const Index whole = pairs_of<T>(feature) ? features / 2 * 2 : 0;
  static_assert(!may_pair<T> || block_lanes<C> == lanes<C>, "pairs fill rows of one tile");
  if constexpr (may_pair<T>)
    if (whole == features && h.col == 1)  // they lie there
      return pack_pairs(from, nullptr, n, features, whole / 2, to);
  pack_lanes<C, T>(from, n, features, h.col, to, row, row);
  if constexpr (may_pair<T>) {
    join_rows(whole, row, row, to, to);
    if (whole && whole < features)  // the last one follows by itself
      std::memcpy(to + whole / 2 * row, to + whole * row, sizeof(C) * row);
  }
}

// The inputs of a block: row(unit, r) is where those of a row begin, `step` apart.
template <class C, class F>
static void inputs_in_lanes(const LaneBlock<C>& b, Index first, Index n, Index in, Index step,
                            C* to, const F& row) {
  for (Index r = 0; r < b.rows; ++r) {
    decltype(row(first, r)) from[block_lanes<C>];
    for (Index l = 0; l < n; ++l) from[l] = row(first + l, r);
    pack_lanes<C>(from, n, in, step, to + r * b.row, b.step(), b.row);
  }
}

// The outputs of n units: rows of `out` side by side.
template <class C>
static void outputs_from_lanes(const LaneBlock<C>& b, Index n, Index out, C* to) {
  for (Index r = 0; r < b.rows; ++r)
    pack<C, C>(n, out, {b.y + r * b.row, 1, b.step()}, to + r * out, b.rows * out, out);
}

// Calls body(units, first, n, block, x) for n units at a time, from `first` on, whose features are
// in the block; its y has room for the widest outputs of a layer, and x for the widest inputs.
template <class T, class F>
static void each_block(const Groups& groups, const TaskVector& h, Index features, Index feature,
                       Index params, Index in, Index out, const F& body) {
  using C = Acc<T>;
  const Units all(groups);
  const Index size = block_units<C>(all.count), row = round_up(size, lanes<C>);
  const Index h_size = features * row, x_size = all.rows * in * row;
  const Index work = size * params * (features + all.rows);
  parallel(
      ceil_div(all.count, size), max(parallel_work / max(work, 1), 1), [&](Index begin, Index end) {
        Units units(groups);
        C* const block = scratch<C>(Slot::block, max(h_size + x_size + all.rows * out * row, 1));
        C *const x = block + h_size, *const y = x + x_size;
        for (Index i = begin; i < end; ++i) {
          const Index first = i * size, n = min(size, units.count - first);
          features_in_lanes<T>(h, features, feature, units, first, n, row, block);
          body(units, first, n,
               LaneBlock<C>{features, units.rows, row, int(ceil_div(n, width<C>)), block, x, y}, x);
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
                  contract_block<T>(p, shared, b);
                  // y is contiguous, be it the result or a copy.
                  outputs_from_lanes(b, n, p.out, y.data + first * b.rows * p.out);
                });
}

}  // namespace hyperfast::HF_ISA
