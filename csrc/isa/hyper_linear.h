// Generate and apply: y[r] = M_b x[r] + v_b, where the head makes M_b and v_b of h_b.
//
// The weights of 48 tasks are generated slice by slice (some inputs, all outputs) into the second-level
// cache and applied from there. The head's bias is the weight of a feature 1, the vector v the weight of
// an input 1, the first of them.
#pragma once

#include "head.h"
#include "task_linear.h"

namespace hyperfast::HF_ISA {

// Outputs of a slice; more of them are further passes over x.
constexpr Index most_outputs = 1024;

// Up to so many outputs, rows of x are multiplied by rows of weights (dot products along the inputs), as
// lanes along the outputs would be mostly empty.
constexpr Index few_outputs = 4;

// How a layer is cut into slices.
template <class C>
struct Slices {
  Index depth;    // features, and 1 for the head's bias
  Index inputs;   // of the layer: in, and 1 for the vector
  Index outputs;  // of a slice, at most
  Index step;     // inputs of a slice
  bool by_output; // order of a slice's weights: outputs outermost
  Index panels, panel, slice;  // panels of a slice; elements of a panel, of a packed slice
  Index row;      // elements of a slice's weights of one task, with a line more against cache conflicts

  explicit Slices(const HyperLinear& p, Index tasks) {
    depth = p.features + (p.matrix.bias != nullptr);
    inputs = p.in + (p.vector.weight != nullptr);
    outputs = max(min(p.out, most_outputs), 1);
    step = max(min(block_elements<C> / (max(min(tasks, task_block), 1) * outputs), inputs), 1);
    by_output = p.out <= few_outputs;
    panels = ceil_div(step * outputs, lanes<C>);
    panel = depth * lanes<C>;
    slice = panels * panel;
    row = panels * lanes<C> + 16;
  }
};

// One panel: lanes [first, first + lanes) of the slice of inputs [i0, i0 + ni), outputs [o0, o0 + no).
template <class T>
static void pack_panel(const HyperLinear& p, const Slices<Acc<T>>& s, Index i0, Index ni, Index o0,
                       Index no, Index first, Acc<T>* dst) {
  using C = Acc<T>;
  const Index vector = p.vector.weight != nullptr;
  const Index n = min(lanes<C>, ni * no - first);
  const T* rows[lanes<C>];
  for (Index l = 0; l < n; ++l) {
    const Index f = first + l;
    const Index i = i0 + (s.by_output ? f % ni : f / no) - vector;
    const Index o = o0 + (s.by_output ? f / ni : f % no);
    const HeadMatrix& m = i < 0 ? p.vector : p.matrix;
    const Index column = max(i, 0);
    rows[l] = static_cast<const T*>(m.weight) + o * m.out + column * m.in;
    if (m.bias)
      dst[p.features * lanes<C> + l] =
          widen(static_cast<const T*>(m.bias)[o * m.bias_out + column * m.bias_in]);
  }
  if (p.matrix.bias)
    for (Index l = n; l < lanes<C>; ++l) dst[p.features * lanes<C> + l] = 0;
  pack_lanes<C, T>(rows, n, p.features, p.matrix.feature, dst, lanes<C>);
}

// y (m, n) += x (m, k) weights (k, n), the weights as a slice holds them.
template <class C>
static void apply(Index m, Index n, Index k, View<const C> x, const C* weights, Index step,
                  bool by_output, View<const C> init, View<C> y) {
  if (by_output) {
    if (x.col != 1) x = compact(x, m, k, Slot::local_b);
    dots<C, C>(m, n, k, x, weights, step, init, y);
    return;
  }
  for (Index j = 0; j < n; j += lanes<C>) {
    const int nj = int(min(lanes<C>, n - j));
    // The last vector may reach into the next input's weights: those lanes are dropped.
    sweep<C, false>(m, int(ceil_div(nj, width<C>)), k, x, weights + j, n, 0,
                    init.data ? init.at(0, j) : init, y.at(0, j), nj);
  }
}

template <class T>
static void hyper_linear_tile(const HyperLinear& p, const Staged<const Acc<T>>& x,
                              const Staged<Acc<T>>& y) {
  using C = Acc<T>;
  const Index tasks = p.groups.pieces;  // a task with very many rows counts as several
  const Slices<C> s(p, tasks);
  const Index vector = p.vector.weight != nullptr;
  const Index count = ceil_div(max(s.inputs, 1), s.step);
  const Index together = min(max(head_elements<C> / max(s.slice, 1), 1), count);
  C* packed = scratch<C>(Slot::head, max(together * s.slice, 1));

  for (Index o0 = 0; o0 < p.out; o0 += s.outputs) {
    const Index no = min(s.outputs, p.out - o0);
    for (Index s0 = 0; s0 < count; s0 += together) {
      const Index s1 = min(s0 + together, count);
      parallel((s1 - s0) * s.panels, max(parallel_work / (8 * max(s.panel, 1)), 1),
               [&](Index first, Index last) {
                 for (Index q = first; q < last; ++q) {
                   const Index i0 = (s0 + q / s.panels) * s.step, ni = min(s.step, s.inputs - i0);
                   const Index lane = q % s.panels * lanes<C>;
                   if (lane < ni * no) pack_panel<T>(p, s, i0, ni, o0, no, lane, packed + q * s.panel);
                 }
               });

      const Index six = ceil_div(tasks, tile_rows);
      const Index rows_each = ceil_div(total_rows(p.groups), max(tasks, 1));
      const Index work = tile_rows * (s1 - s0) * s.step * no * (s.depth + rows_each);
      parallel(six, max(parallel_work / max(work, 1), 1), [&](Index first, Index last) {
        C* h = scratch<C>(Slot::local_a, task_block * max(s.depth, 1));
        C* weights = scratch<C>(Slot::block, task_block * s.row + lanes<C>);
        const Index end = min(last * tile_rows, tasks);
        for (Index u0 = first * tile_rows; u0 < end; u0 += task_block) {
          const Index nu = min(task_block, end - u0);
          for (Index u = 0; u < nu; ++u)
            copy_features<T>(p.h, piece(p.groups, u0 + u).task, p.features, p.matrix.bias,
                             h + u * s.depth);
          for (Index q = s0; q < s1; ++q) {
            const Index i0 = q * s.step, ni = min(s.step, s.inputs - i0);
            for (Index f = 0; f < ni * no; f += lanes<C>) {
              const C* panel = packed + (q - s0) * s.slice + f * s.depth;
              const int vecs = int(ceil_div(min(lanes<C>, ni * no - f), width<C>));
              sweep_deep<C>(nu, vecs, s.depth, {h, s.depth, 1}, panel, {}, {weights + f, s.row, 1},
                            vecs * width<C>);
            }
            const bool add_vector = vector && q == 0;  // its weights lead the first slice
            const Index skip = add_vector ? (s.by_output ? 1 : no) : 0;
            for (Index u = 0; u < nu; ++u) {
              const Piece piece_u = piece(p.groups, u0 + u);
              const View<C> out = y.of(piece_u).at(0, o0);
              const C* w = weights + u * s.row;
              const View<const C> init = add_vector ? View<const C>{w, 0, s.by_output ? ni : 1}
                                         : q        ? View<const C>{out.data, out.row, out.col}
                                                    : View<const C>{};
              apply<C>(piece_u.end - piece_u.begin, no, ni - add_vector,
                       x.of(piece_u).at(0, i0 + add_vector - vector), w + skip, ni, s.by_output, init,
                       out);
            }
          }
        }
      });
    }
  }
}

template <class T>
static void hyper_linear_typed(const HyperLinear& p) {
  const auto x = stage<T>(p.x, p.groups, p.in, Slot::rows_a);
  const auto y = place<T>(p.y, p.groups, p.out, Slot::rows_out);
  hyper_linear_tile<T>(p, x, y);
  unstage<T>(y, p.y, p.groups, p.out);
}

static void hyper_linear(const HyperLinear& p) {
  with_type(p.dtype, [&](auto t) { hyper_linear_typed<decltype(t)>(p); });
}

}  // namespace hyperfast::HF_ISA
