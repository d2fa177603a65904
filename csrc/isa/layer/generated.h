// Generate and apply: y[r] = M_b x[r] + v_b, where the head makes M_b and v_b of h_b.
//
// The weights of 48 tasks are generated slice by slice (some inputs, all outputs) into the
// second-level cache and applied from there. The head's bias is the weight of a feature 1, the
// vector v the weight of an input 1, the first of them.
#pragma once

#include "isa/layer/contract_amx.h"
#include "isa/product/dot.h"

namespace hyperfast::HF_ISA {

// How a layer is cut into slices: as many outputs as the lanes of a tile, and all inputs if they
// fit, so that y is written once.
template <class C>
struct Slices {
  bool pairs;                 // features go in pairs of bf16
  Index depth;                // features and 1 for the head's bias, or pairs of them
  Index inputs;               // of the layer: in, and 1 for the vector
  Index no, ni;               // outputs and inputs of a slice, at most
  Index down, across, count;  // slices along the outputs, the inputs, and in all
  bool by_output;             // order of a slice's weights: outputs outermost
  Index block;                // tasks at a time
  Index panels, panel, size;  // panels of a slice; elements of a panel, of a packed slice
  Index row;  // elements of a slice's weights of one task, and a line more against cache conflicts

  explicit Slices(const HyperLinear& p) {
    pairs = p.dtype == Dtype::bf16 && pairs_of<bf16>(p.matrix.feature);
    depth = p.features + p.head_bias();
    if (pairs) depth = ceil_div(depth, 2);
    inputs = p.in + (p.vector.weight != nullptr);
    by_output = p.out <= few_outputs;
    no = max(min(p.out, lanes<C>), 1);
    ni = max(min(inputs, block_elements<C> / (task_block * no)), 1);
    down = ceil_div(p.out, no);
    across = ceil_div(max(inputs, 1), ni);
    count = down * across;
    block = min(block_elements<C> / (no * ni) / tile_rows * tile_rows, task_block);
    panels = ceil_div(no * ni, lanes<C>);
    panel = depth * lanes<C>;
    size = panels * panel;
    row = panels * lanes<C> + 16;
  }
};

// One slice: outputs [o0, o0 + no), inputs [i0, i0 + ni), of which the vector is number 0.
struct Slice {
  Index o0, no, i0, ni;
};

template <class C>
static Slice slice(const HyperLinear& p, const Slices<C>& s, Index q) {
  const Index o0 = q / s.across * s.no, i0 = q % s.across * s.ni;
  return {o0, min(s.no, p.out - o0), i0, min(s.ni, s.inputs - i0)};
}

// One panel: weights [first, first + lanes) of a slice.
template <class T>
static void pack_panel(const HyperLinear& p, const Slices<Acc<T>>& s, const Slice& c, Index first,
                       Acc<T>* dst) {
  using C = Acc<T>;
  const Index vector = p.vector.weight != nullptr;
  const Index n = min(lanes<C>, c.ni * c.no - first);
  const T* rows[lanes<C>];
  T bias[lanes<C>] = {};
  for (Index l = 0; l < n; ++l) {
    const Index f = first + l;
    const Index i = c.i0 + (s.by_output ? f % c.ni : f / c.no) - vector;
    const Index o = c.o0 + (s.by_output ? f / c.ni : f % c.no);
    const HeadMatrix& m = i < 0 ? p.vector : p.matrix;
    const Index column = max(i, 0);
    rows[l] = static_cast<const T*>(m.weight) + o * m.out_stride + column * m.in_stride;
    if (m.bias)
      bias[l] = static_cast<const T*>(m.bias)[o * m.bias_out_stride + column * m.bias_in_stride];
  }
  if constexpr (std::is_same_v<T, bf16>)
    if (s.pairs) return pack_pairs(rows, bias, n, p.features, s.depth, dst);
  pack_lanes<C, T>(rows, n, p.features, p.matrix.feature, dst, lanes<C>, lanes<C>);
  if (p.head_bias())
    for (Index l = 0; l < lanes<C>; ++l) dst[p.features * lanes<C> + l] = widen(bias[l]);
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

// The weights of a slice for `tasks` pieces from `first` on, `s.row` apart; h are their features.
template <class C>
static void generate(const Slices<C>& s, const Slice& c, Index tasks, const C* h, const C* packed,
                     C* weights) {
  for (Index f = 0; f < c.ni * c.no; f += lanes<C>) {
    const int vecs = int(ceil_div(min(lanes<C>, c.ni * c.no - f), width<C>));
    (s.pairs ? sweep_deep<C, PairDot<C>>
             : sweep_deep<C, MultiplyAdd>)(tasks, vecs, s.depth, {h, s.depth, 1},
                                           packed + f * s.depth, {}, {weights + f, s.row, 1},
                                           vecs * width<C>, nullptr);
  }
}

// Of one task's slice, all but the vector: the first input of each output, or the first `lead`.
template <class C>
static void transform_slice(Transform kind, const Slice& c, bool by_output, Index lead, C* w) {
  if (kind == Transform::none) return;
  const Index runs = by_output ? c.no : 1, n = by_output ? c.ni : c.ni * c.no;
  for (Index j = 0; j < runs; ++j) transform<C>(kind, n - lead, w + j * n + lead);
}

template <class T>
static void hyper_linear_tile(const HyperLinear& p, const Staged<const Acc<T>>& x,
                              const Staged<Acc<T>>& y) {
  using C = Acc<T>;
  const Index tasks = p.groups.pieces;  // a task with very many rows counts as several
  const Slices<C> s(p);
  const Index vector = p.vector.weight != nullptr;
  const Index together = max(min(head_elements<C> / max(s.size, 1), s.count), 1);
  C* packed = scratch<C>(Slot::head, max(together * s.size, 1));
  const C* shared = shared_bias<T>(p);

  for (Index q0 = 0; q0 < s.count; q0 += together) {
    const Index q1 = min(q0 + together, s.count);
    parallel((q1 - q0) * s.panels, max(parallel_work / (8 * max(s.panel, 1)), 1),
             [&](Index first, Index last) {
               for (Index j = first; j < last; ++j) {
                 const Slice c = slice(p, s, q0 + j / s.panels);
                 const Index lane = j % s.panels * lanes<C>;
                 if (lane < c.ni * c.no) pack_panel<T>(p, s, c, lane, packed + j * s.panel);
               }
             });

    const Index rows_each = ceil_div(total_rows(p.groups), max(tasks, 1));
    const Index work = tile_rows * (q1 - q0) * s.no * s.ni * (s.depth + rows_each);
    // Whole blocks of tasks, as each streams the head.
    const Index tiles = ceil_div(tasks, tile_rows), block = s.block / tile_rows;
    const Index least = min(block, ceil_div(tiles, thread_count()));
    parallel(tiles, max(max(parallel_work / max(work, 1), least), 1), [&](Index first, Index last) {
      C* h = scratch<C>(Slot::local_a, s.block * max(s.depth, 1));
      C* weights = scratch<C>(Slot::block, s.block * s.row + lanes<C>);
      const Index end = min(last * tile_rows, tasks);
      for (Index u0 = first * tile_rows; u0 < end; u0 += s.block) {
        const Index nu = min(s.block, end - u0);
        for (Index u = 0; u < nu; ++u) {
          const Index task = piece(p.groups, u0 + u).task;
          if (s.pairs)
            copy_feature_pairs(p.h, task, p.features, p.head_bias(),
                               reinterpret_cast<float*>(h + u * s.depth));
          else
            copy_features<T>(p.h, task, p.features, p.head_bias(), h + u * s.depth);
        }
        for (Index q = q0; q < q1; ++q) {
          const Slice c = slice(p, s, q);
          generate<C>(s, c, nu, h, packed + (q - q0) * s.size, weights);
          const bool add_vector = vector && c.i0 == 0;  // its weights lead the slice
          const Index lead = add_vector ? (s.by_output ? 1 : c.no) : 0;
          for (Index u = 0; u < nu; ++u) {
            const Piece r = piece(p.groups, u0 + u);
            const View<C> out = y.of(r).at(0, c.o0);
            C* w = weights + u * s.row;
            transform_slice<C>(p.transform, c, s.by_output, lead, w);
            const View<const C> init = add_vector ? View<const C>{w, 0, s.by_output ? c.ni : 1}
                                       : c.i0     ? View<const C>{out.data, out.row, out.col}
                                       : shared   ? View<const C>{shared + c.o0, 0, 1}
                                                  : View<const C>{};
            apply<C>(r.end - r.begin, c.no, c.ni - add_vector,
                     x.of(r).at(0, c.i0 + add_vector - vector), w + lead, c.ni, s.by_output, init,
                     out);
          }
        }
      }
    });
  }
}

// All weights first, in the order in which the head's rows lie, then all rows. The head is read
// once and never packed for few tasks, which is what this plan is for.
template <class T>
static void hyper_linear_whole(const HyperLinear& p, const Staged<const Acc<T>>& x,
                               const Staged<Acc<T>>& y) {
  using C = Acc<T>;
  const Index tasks = p.groups.pieces;
  const bool by_output =
      p.matrix.out_stride >= p.matrix.in_stride;  // else by input: the layer turned around
  const Index outer = by_output ? p.out : p.in, inner = by_output ? p.in : p.out;
  const Index vector = p.vector.weight ? p.out : 0, count = p.out * p.in + vector;
  C* w = scratch<C>(Slot::head, max(tasks * count, 1));
  C* h = scratch<C>(Slot::features, max(tasks * p.features, 1));
  for (Index u = 0; u < tasks; ++u)
    copy_features<T>(p.h, piece(p.groups, u).task, p.features, false, h + u * p.features);

  // One run of the head's rows for each of the outer, and one for the vector.
  const Index work = max(tasks * inner * p.features, 1);
  parallel(outer + (vector > 0), max(parallel_work / work, 1), [&](Index first, Index last) {
    for (Index j = first; j < last; ++j) {
      const HeadMatrix& m = j < outer ? p.matrix : p.vector;
      const Index n = j < outer ? inner : p.out, from = j < outer ? j : 0;
      const Index step = j < outer && by_output ? m.in_stride : m.out_stride;
      const Index jump = j < outer && by_output ? m.out_stride : m.in_stride;
      const Index bias_step = j < outer && by_output ? m.bias_in_stride : m.bias_out_stride;
      const Index bias_jump = j < outer && by_output ? m.bias_out_stride : m.bias_in_stride;
      const View<const T> rows = {static_cast<const T*>(m.weight) + from * jump, step, m.feature};
      const View<C> to = {w + j * inner, count, 1};
      if (m.feature == 1 && tasks <= few_rows)
        dots<C, T>(n, tasks, p.features, rows, h, p.features, {}, to.transposed());
      else
        multiply<C, T>(tasks, n, p.features, {h, p.features, 1}, rows.transposed(), {}, to);
      if (m.bias) {
        const T* bias = static_cast<const T*>(m.bias) + from * bias_jump;
        for (Index u = 0; u < tasks; ++u)
          for (Index i = 0; i < n; ++i) to.data[u * count + i] += widen(bias[i * bias_step]);
      }
      for (Index u = 0; j < outer && u < tasks; ++u)
        transform<C>(p.transform, n, to.data + u * count);
    }
  });

  const C* shared = shared_bias<T>(p);
  const Index rows_each = ceil_div(total_rows(p.groups), max(tasks, 1));
  parallel(tasks, max(parallel_work / max(rows_each * count, 1), 1), [&](Index first, Index last) {
    for (Index u = first; u < last; ++u) {
      const Piece r = piece(p.groups, u);
      const Index m = r.end - r.begin;
      const C* own = w + u * count;
      const View<const C> init = {vector ? own + p.out * p.in : shared, 0, 1};
      View<const C> rows = x.of(r);
      if (by_output && m <= few_rows) {
        if (rows.col != 1) rows = compact(rows, m, p.in, Slot::local_b);
        dots<C, C>(p.out, m, p.in, {own, p.in, 1}, rows.data, rows.row, init.transposed(),
                   y.of(r).transposed());
      } else {
        const View<const C> transposed =
            by_output ? View<const C>{own, 1, p.in} : View<const C>{own, p.out, 1};
        multiply<C, C>(m, p.out, p.in, rows, transposed, init, y.of(r));
      }
    }
  });
}

// Of rows where kernels want them.
template <class T>
static void hyper_linear_staged(const HyperLinear& p, const Staged<const Acc<T>>& x,
                                const Staged<Acc<T>>& y) {
#ifdef HF_MATRIX_UNIT
  if constexpr (std::is_same_v<Acc<T>, float>)
    if (p.plan == Plan::contract && hyper_linear_on_matrix_unit<T>(p, x, y)) return;
#endif
  (p.plan == Plan::materialize ? hyper_linear_whole<T>
   : p.plan == Plan::contract  ? hyper_linear_contract<T>
                               : hyper_linear_tile<T>)(p, x, y);
}

template <class T>
static void hyper_linear_typed(const HyperLinear& p) {
  const auto y = place<T>(p.y, p.groups, p.out, Slot::rows_out);
  hyper_linear_staged<T>(p, stage<T>(p.x, p.groups, p.in, Slot::rows_a), y);
  unstage<T>(y, p.y, p.groups, p.out);
}

static void hyper_linear(const HyperLinear& p) {
  with_type(p.dtype, [&](auto t) { hyper_linear_typed<decltype(t)>(p); });
}

}  // namespace hyperfast::HF_ISA
