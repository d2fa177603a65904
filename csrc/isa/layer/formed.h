// G, the gradient of the generated weights before they are transformed, formed for a block of tasks
// and a run of their weights: threads share tasks and outputs, and read it together.
#pragma once

#include "isa/layer/head.h"
#include "isa/simd/transform.h"

namespace hyperfast::HF_ISA {

// Elements of G at a time: 4 MiB, which stay in the third-level cache.
template <class C>
constexpr Index formed_elements = (4 << 20) / Index(sizeof(C));

// Tasks at a time. Where they have few rows, many of them, as for each block of tasks the head is
// read and its gradient added to once more; where they have many, fewer, and longer runs, as for
// each run the rows are read once more.
static inline Index formed_tasks(Index tasks, Index rows) {
  const Index most = (rows < 32 * tasks ? 80 : 16) * tile_rows, blocks = ceil_div(tasks, most);
  return max(round_up(ceil_div(tasks, max(blocks, 1)), tile_rows), tile_rows);
}

// A run of consecutive rows of the head: outputs [o0, o0 + no) and inputs [i0, i0 + ni) of the
// matrix, or of the vector, which is a matrix of the one input 1. Either no == 1 or the inputs are
// all there.
struct Run {
  bool vector;
  Index o0, no, i0, ni;

  Index size() const { return no * ni; }
};

// Cuts the head's rows into runs of at most `most` of them, matrix first.
struct Runs {
  Index out, in, wide, tall;  // wide: inputs of a run, tall: outputs of a run
  Index across, matrix, total;
  Index vector_tall;

  Runs(Index out, Index in, bool vector, Index most) : out(out), in(in) {
    wide = max(min(in, most), 1);
    tall = wide < in ? 1 : max(min(most / wide, out), 1);
    if (tall < out && tall > tile_rows) tall = tall / tile_rows * tile_rows;
    across = ceil_div(in, wide);
    matrix = ceil_div(out, tall) * across;
    vector_tall = min(most, max(out, 1));
    total = matrix + (vector ? ceil_div(out, vector_tall) : 0);
  }

  Run operator[](Index q) const {
    if (q < matrix) {
      const Index o = q / across * tall, i = q % across * wide;
      return {false, o, min(tall, out - o), i, min(wide, in - i)};
    }
    const Index o = (q - matrix) * vector_tall;
    return {true, o, min(vector_tall, out - o), 0, 1};
  }

  Index longest() const { return max(tall * wide, vector_tall); }
};

// g (no, ni) = A^T B for so many rows of A and B that both are copied: as they lie, they may be
// pages apart, and those a power of two apart share few sets of the first-level cache.
template <class C>
static void multiply_rows(Index m, Index no, Index ni, View<const C> a, View<const C> b, C* g) {
  constexpr Index wide = 7 * lanes<C>;  // inputs at a time
  const Index most = min(m, depth_block), a_row = odd_lines<C>(no),
              b_row = odd_lines<C>(min(ni, wide));
  C* const outputs = scratch<C>(Slot::local_b, most * a_row);
  C* const inputs = scratch<C>(Slot::panel, most * b_row);
  for (Index k = 0; k < m; k += most) {
    const Index depth = min(most, m - k);
    pack<C, C>(depth, no, a.at(k, 0), outputs, a_row, no);
    for (Index i = 0; i < ni; i += lanes<C>) {
      const Index n = min(lanes<C>, ni - i), at = i % wide;
      if (at == 0) pack<C, C>(depth, min(wide, ni - i), b.at(k, i), inputs, b_row, b_row);
      C* const to = g + i;
      sweep<C, false>(no, int(ceil_div(n, width<C>)), depth, {outputs, 1, a_row}, inputs + at,
                      b_row, 0, {k ? to : nullptr, ni, 1}, {to, ni, 1}, int(n));
    }
  }
}

// g (no, ni) row-major = sum over the m rows of grad (x) x, for the run's outputs and inputs.
template <class C>
static void form(const Run& run, Index m, View<const C> grad, View<const C> x, C* g) {
  static const C one = 1;
  grad = grad.at(0, run.o0);
  x = run.vector ? View<const C>{&one, 0, 0} : x.at(0, run.i0);
  if (run.ni < run.no &&
      (m > 1 || run.vector)) {  // lanes along the longer side; one row's g is written as it lies
    multiply<C, C>(run.ni, run.no, m, x.transposed(), grad, {}, {g, 1, run.ni});
  } else if (m >= 16 && run.no >= 4 * tile_rows && run.ni >= lanes<C>) {
    multiply_rows<C>(m, run.no, run.ni, grad, x, g);
  } else {
    multiply<C, C>(run.no, run.ni, m, grad.transposed(), x, {}, {g, run.ni, 1});
  }
}

// One run's G of tasks (pieces) [first, first + n), `row` elements apart.
template <class C>
struct Formed {
  Run run;
  Index first, n;
  C* g;
  Index row;
};

template <class C>
static void form_all(const HyperLinearGrad& p, const Formed<C>& f, const Staged<const C>& grad,
                     const Staged<const C>& x) {
  // Outputs of a task are shared out too where there are fewer tasks than threads want.
  const Index wanted = max(ceil_div(4 * thread_count(), f.n), 1);
  const Index each = max(round_up(ceil_div(f.run.no, wanted), tile_rows), tile_rows);
  const Index parts = max(ceil_div(f.run.no, each), 1);
  const Index rows = ceil_div(total_rows(p.groups), max(p.groups.pieces, 1));
  const Index work = each * f.run.ni * (rows + 1);
  parallel(f.n * parts, max(parallel_work / max(work, 1), 1), [&](Index first, Index last) {
    for (Index j = first; j < last; ++j) {
      const Index u = j / parts, o = j % parts * each;
      const Piece r = piece(p.groups, f.first + u);
      const Run part{f.run.vector, f.run.o0 + o, min(each, f.run.no - o), f.run.i0, f.run.ni};
      form<C>(part, r.end - r.begin, grad.of(r), x.of(r), f.g + u * f.row + o * f.run.ni);
    }
  });
}

// G times the transform's slope: the weights before it are generated again, for all tasks of the
// block a panel at a time. h are the features of all tasks, as rows.
template <class T>
static void times_slope(const HyperLinearGrad& p, const Formed<Acc<T>>& f, const Acc<T>* h) {
  using C = Acc<T>;
  const HeadMatrix& m = p.matrix;
  const Index size = f.run.size(), work = lanes<C> * f.n * (p.features + 8);
  parallel(ceil_div(size, lanes<C>), max(parallel_work / max(work, 1), 1),
           [&](Index begin, Index end) {
             C* packed = scratch<C>(Slot::local_a, max(p.features, 1) * lanes<C>);
             C* made = scratch<C>(Slot::block, f.n * lanes<C>);
             for (Index j = begin; j < end; ++j) {
               const Index first = j * lanes<C>, n = min(lanes<C>, size - first);
               const T* rows[lanes<C>];
               C bias[lanes<C>] = {};
               for (Index l = 0; l < n; ++l) {
                 const Index o = f.run.o0 + (first + l) / f.run.ni,
                             i = f.run.i0 + (first + l) % f.run.ni;
                 rows[l] = static_cast<const T*>(m.weight) + o * m.out_stride + i * m.in_stride;
                 if (m.bias)
                   bias[l] = widen(
                       static_cast<const T*>(m.bias)[o * m.bias_out_stride + i * m.bias_in_stride]);
               }
               pack_lanes<C, T>(rows, n, p.features, m.feature, packed, lanes<C>, lanes<C>);
               const int vecs = int(ceil_div(n, width<C>));
               sweep_deep<C>(f.n, vecs, p.features, {h + f.first * p.features, p.features, 1},
                             packed, {bias, 0, 1}, {made, lanes<C>, 1}, vecs * width<C>);
               for (Index u = 0; u < f.n; ++u)
                 transform_slope<C>(p.transform, n, made + u * lanes<C>, f.g + u * f.row + first);
             }
           });
}

}  // namespace hyperfast::HF_ISA
