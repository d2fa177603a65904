// Generate and apply where few rows share a task: the lanes are rows, each with the features of its own
// task, and the head is read as it lies, once for a block of rows. A weight lives in a register from the
// moment it is generated until it has been multiplied by its input: none is ever stored, nothing packed.
#pragma once

#include "head.h"

namespace hyperfast::HF_ISA {

// How a strip of M weights is used: those of M inputs of one output, y += w[m] * x[m]; those of M outputs
// of one input, y[m] += w[m] * x; or y[m] = w[m].
enum class Use { inputs, outputs, store };

template <class T>
struct Strip {
  const T* weight;
  Index step, feature;  // from one weight to the next, from one of its features to the next
  const T* bias;        // or null
  Index bias_step;
};

// h (depth, lanes), x (inputs, lanes), y (outputs, lanes): rows of `lanes<C>`, of which V vectors count.
template <int M, int V, Use use, class T, class C = Acc<T>>
static void strip(const Strip<T>& s, Index depth, const C* h, const C* x, C* y) {
  constexpr int w = width<C>;
  Vec<C> acc[M][V];
  const T* rows[M];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    rows[m] = s.weight + m * s.step;
    const Vec<C> start = (s.bias ? C(widen(s.bias[m * s.bias_step])) : C(0)) - Vec<C>{};
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[m][v] = start;
  }
  const T* ahead = s.weight + M * s.step;
  for (Index k = 0; k < depth; ++k) {
    Vec<C> hv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) hv[v] = load(h + k * lanes<C> + v * w);
    prefetch(ahead + k * M);  // the next M weights, if they follow
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const C a = widen(rows[m][k * s.feature]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[m][v] += a * hv[v];
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    if constexpr (use == Use::inputs) {
      Vec<C> sum = load(y + v * w);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) sum += acc[m][v] * load(x + m * lanes<C> + v * w);
      store(y + v * w, sum);
    } else {
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        C* to = y + m * lanes<C> + v * w;
        store(to, use == Use::store ? acc[m][v] : load(to) + acc[m][v] * load(x + v * w));
      }
    }
  }
}

template <class T>
using StripOf = void (*)(const Strip<T>&, Index, const Acc<T>*, const Acc<T>*, Acc<T>*);

template <class T, Use use, int M>
constexpr StripOf<T> pick_strip(int vecs) {
  if constexpr (tile_vecs == 4) {
    if (vecs == 4) return strip<M, 4, use, T>;
    if (vecs == 3) return strip<M, 3, use, T>;
  }
  return vecs == 2 ? strip<M, 2, use, T> : strip<M, 1, use, T>;
}

// n weights from s on, in strips of 6, 4, 2 and 1.
template <class T, Use use>
static void strips(Index n, int vecs, Strip<T> s, Index depth, const Acc<T>* h, const Acc<T>* x,
                   Acc<T>* y) {
  const auto steps = [&](Index height, StripOf<T> f) {
    for (; n >= height; n -= height) {
      f(s, depth, h, x, y);
      s.weight += height * s.step;
      if (s.bias) s.bias += height * s.bias_step;
      if (use == Use::inputs)
        x += height * lanes<Acc<T>>;
      else
        y += height * lanes<Acc<T>>;
    }
  };
  steps(6, pick_strip<T, use, 6>(vecs));
  steps(4, pick_strip<T, use, 4>(vecs));
  steps(2, pick_strip<T, use, 2>(vecs));
  steps(1, pick_strip<T, use, 1>(vecs));
}

template <class T>
static Strip<T> strip_of(const HeadMatrix& m, Index o, Index i, bool along_inputs) {
  return {static_cast<const T*>(m.weight) + o * m.out + i * m.in, along_inputs ? m.in : m.out,
          m.feature, m.bias ? static_cast<const T*>(m.bias) + o * m.bias_out + i * m.bias_in : nullptr,
          along_inputs ? m.bias_in : m.bias_out};
}

// One block of rows: h (features, lanes) and x (in, lanes) to y (out, lanes).
template <class T>
static void contract_block(const HyperLinear& p, int vecs, const Acc<T>* h, const Acc<T>* x, Acc<T>* y) {
  using C = Acc<T>;
  if (p.vector.weight) {
    strips<T, Use::store>(p.out, vecs, strip_of<T>(p.vector, 0, 0, false), p.features, h, x, y);
  } else {
    for (Index j = 0; j < p.out * lanes<C>; ++j) y[j] = 0;
  }
  // Strips run along the side whose weights follow one another in memory (in a layer that is turned
  // around, the outputs), unless it is too short to fill them.
  const bool by_inputs = p.matrix.in <= p.matrix.out;
  if (by_inputs ? p.in >= min(tile_rows, p.out) : p.out < min(tile_rows, p.in))
    for (Index o = 0; o < p.out; ++o)
      strips<T, Use::inputs>(p.in, vecs, strip_of<T>(p.matrix, o, 0, true), p.features, h, x,
                             y + o * lanes<C>);
  else
    for (Index i = 0; i < p.in; ++i)
      strips<T, Use::outputs>(p.out, vecs, strip_of<T>(p.matrix, 0, i, false), p.features, h,
                              x + i * lanes<C>, y);
}

// The rows of all pieces, numbered one after another as they are staged.
struct RowOwners {
  const Groups& groups;
  Index piece_number = 0, first = 0;

  // The task of row r, asked for in rising order.
  Index operator()(Index r) {
    if (!groups.ragged) return r / max(groups.rows, 1);
    while (r >= groups.list[piece_number].end) ++piece_number;
    return groups.list[piece_number].task;
  }
};

// Rows of a block: as many as there are lanes, fewer where threads would be left without.
template <class C>
static Index block_rows(Index rows) {
  const Index blocks = max(ceil_div(rows, lanes<C>), min(thread_count(), ceil_div(rows, width<C>)));
  return max(round_up(ceil_div(rows, max(blocks, 1)), width<C>), width<C>);
}

template <class T>
static void hyper_linear_contract(const HyperLinear& p, const Staged<const Acc<T>>& x,
                                  const Staged<Acc<T>>& y) {
  using C = Acc<T>;
  const Index rows = total_rows(p.groups), size = block_rows<C>(rows);
  const Index work = size * p.features * p.out * (p.in + 1);
  parallel(ceil_div(rows, size), max(parallel_work / max(work, 1), 1), [&](Index begin, Index end) {
    const Index elements = (p.features + p.in + p.out) * lanes<C>;
    C* h = scratch<C>(Slot::block, max(elements, 1));
    C* xs = h + p.features * lanes<C>;
    C* ys = xs + p.in * lanes<C>;
    RowOwners owner{p.groups};
    for (Index b = begin; b < end; ++b) {
      const Index first = b * size, n = min(size, rows - first);
      const T* features[lanes<C>];
      const C* inputs[lanes<C>];
      for (Index l = 0; l < n; ++l) {
        const Index r = first + l, task = owner(r);
        features[l] = static_cast<const T*>(p.h.data) + task * p.h.task;
        inputs[l] = x.data + (p.groups.ragged ? r * x.row : task * x.task + r % p.groups.rows * x.row);
      }
      pack_lanes<C, T>(features, n, p.features, p.h.col, h, lanes<C>, lanes<C>);
      pack_lanes<C, C>(inputs, n, p.in, x.col, xs, lanes<C>, lanes<C>);
      contract_block<T>(p, int(ceil_div(n, width<C>)), h, xs, ys);
      // y is contiguous, be it the result or a copy.
      pack<C, C>(n, p.out, View<const C>{ys, 1, lanes<C>}, y.data + first * p.out, p.out);
    }
  });
}

}  // namespace hyperfast::HF_ISA
