// The gradients of contract.h: rows are lanes again. A row's share of the gradient of its task's weights,
// G[p][row] = grad[o][row] * x[i][row] for p = (o, i), is formed a panel at a time and used from there.
#pragma once

#include "contract.h"

namespace hyperfast::HF_ISA {

// Parameters of a panel of G. A strip of features touches one line of each of their rows of the head:
// these lines, a row apart, fall into few sets of the first-level cache, which they share with the panel.
static inline Index panel_depth(Index features) { return max(min(6144 / max(features, 1), 96) / 16, 2) * 16; }

// Rows turned around: entry (column, row) at data + column * row_count + row, rows padded with zeros to
// whole vectors.
template <class C>
struct Turned {
  const C* data;
  Index row_count;

  const C* at(Index column, Index row) const { return data + column * row_count + row; }
};

template <class C>
static Turned<C> turn(const Staged<const C>& rows, const Groups& g, Index columns, Slot slot) {
  const Index count = total_rows(g), padded = round_up(count, width<C>);
  C* to = scratch<C>(slot, max(columns * padded, 1));
  parallel(padded / width<C>, max(parallel_work / max(16 * columns, 1), 1), [&](Index begin, Index end) {
    for (Index r = begin * width<C>; r < end * width<C>; r += width<C>) {
      const C* from[width<C>];
      const Index n = min(width<C>, count - r);
      for (Index l = 0; l < n; ++l) {
        const Index j = r + l;
        from[l] = rows.data + (g.ragged ? j * rows.row : j / g.rows * rows.task + j % g.rows * rows.row);
      }
      pack_lanes<C, C>(from, n, columns, rows.col, to + r, padded, width<C>);
    }
  });
  return {to, padded};
}

// G of parameters [p, p + count), for `vecs` vectors of rows from `row` on; `to` has `lead` lanes a
// parameter. The head's rows are those of the matrix, then those of the vector, whose input is 1.
template <class C>
static void form_panel(Index out, Index in, const Turned<C>& grad, const Turned<C>& x, Index p,
                       Index count, Index row, int vecs, C* to, Index lead) {
  constexpr int w = width<C>;
  while (count > 0) {
    const bool vector = p >= out * in;
    const Index o = vector ? p - out * in : p / in, i = vector ? 0 : p % in;
    const Index n = vector ? 1 : min(in - i, count);
    for (int v = 0; v < vecs; ++v) {
      const Vec<C> g = load(grad.at(o, row) + v * w);
      const C* from = x.at(i, row) + v * w;
      C* out_lanes = to + v * w;
      if (vector)
        store(out_lanes, g);
      else
        for (Index j = 0; j < n; ++j, from += x.row_count, out_lanes += lead)
          store(out_lanes, g * load(from));
    }
    p += n;
    count -= n;
    to += n * lead;
  }
}

// One row (features) for every row of x: parts (rows, features).
template <class T>
static void grad_h_contract(const HyperLinearGradH& p, const Turned<Acc<T>>& grad,
                            const Turned<Acc<T>>& x, Acc<T>* parts) {
  using C = Acc<T>;
  const Index rows = total_rows(p.groups), size = block_rows<C>(rows);
  const Index params = p.out * (p.in + (p.vector.weight != nullptr));
  const Index work = size * p.features * params;
  // The vector's rows follow those of the matrix.
  const T* weight = static_cast<const T*>(p.matrix.weight);
  const Index step = p.matrix.in;
  parallel(ceil_div(rows, size), max(parallel_work / max(work, 1), 1), [&](Index begin, Index end) {
    const Index most = panel_depth(p.features);
    C* sums = scratch<C>(Slot::block, (p.features + most) * lanes<C>);
    C* g = sums + p.features * lanes<C>;
    for (Index b = begin; b < end; ++b) {
      const Index first = b * size, n = min(size, rows - first);
      const int vecs = int(ceil_div(n, width<C>));
      for (Index q = 0; q < params; q += most) {
        const Index depth = min(most, params - q);
        form_panel<C>(p.out, p.in, grad, x, q, depth, first, vecs, g, lanes<C>);
        const View<const C> before = q ? View<const C>{sums, lanes<C>, 1} : View<const C>{};
        if constexpr (std::is_same_v<C, T>) {
          sweep<C, false>(p.features, vecs, depth, {weight + q * step, p.matrix.feature, step}, g,
                          lanes<C>, 0, before, {sums, lanes<C>, 1}, vecs * width<C>,
                          weight + (q + depth) * step);
        } else {
          C* wide = scratch<C>(Slot::local_a, depth * p.features);
          pack<C, T>(depth, p.features, {weight + q * step, step, p.matrix.feature}, wide, p.features);
          sweep<C, false>(p.features, vecs, depth, {wide, 1, p.features}, g, lanes<C>, 0, before,
                          {sums, lanes<C>, 1}, vecs * width<C>);
        }
      }
      pack<C, C>(n, p.features, View<const C>{sums, 1, lanes<C>}, parts + first * p.features, p.features);
    }
  });
}

// y (params, features), in the accumulation type.
template <class T>
static void grad_weight_contract(const HyperLinearGradWeight& p, const Turned<Acc<T>>& grad,
                                 const Turned<Acc<T>>& x, Acc<T>* y) {
  using C = Acc<T>;
  const Index rows = total_rows(p.groups), params = p.out * (p.in + p.target_bias);
  const Index panels = ceil_div(p.features, lanes<C>);
  C* h = scratch<C>(Slot::features, max(rows * panels * lanes<C>, 1));
  parallel(rows, max(parallel_work / (8 * panels * lanes<C>), 1), [&](Index begin, Index end) {
    RowOwners owner{p.groups};
    for (Index r = begin; r < end; ++r) {
      const T* from = static_cast<const T*>(p.h.data) + owner(r) * p.h.task;
      for (Index j = 0; j < panels; ++j)
        for (Index l = 0, k = j * lanes<C>; l < lanes<C>; ++l, ++k)
          h[(j * rows + r) * lanes<C> + l] = k < p.features ? widen(from[k * p.h.col]) : 0;
    }
  });
  // Rows at a time, so that their features stay in the first-level cache (32 KiB), with G of so many
  // parameters (at most 12 KiB). Sums of a run of parameters stay in the second level. They do not run
  // along it, so the number of threads does not show in the result.
  const Index together = max(min(8192 / (panels * lanes<C>), 128), 32);
  constexpr Index few = 4 * tile_rows;
  const Index most = max(block_elements<C> / max(p.features, 1) / few, 1) * few;
  const Index run = min(most, round_up(ceil_div(params, 4 * thread_count()), few));
  const Index work = run * rows * p.features;
  parallel(ceil_div(params, run), max(parallel_work / max(work, 1), 1), [&](Index begin, Index end) {
    C* g = scratch<C>(Slot::block, few * together);
    for (Index q = begin * run; q < min(end * run, params); q += run) {
      const Index stop = min(q + run, params);
      Index r = 0;
      do {  // once even without rows: the gradient is then zero
        const Index n = min(together, rows - r);
        for (Index c = q; c < stop; c += few) {
          const Index count = min(few, stop - c);
          form_panel<C>(p.out, p.in, grad, x, c, n ? count : 0, r, int(ceil_div(n, width<C>)), g, together);
          for (Index j = 0; j < panels; ++j) {
            const Index k0 = j * lanes<C>;
            const int nk = int(min(lanes<C>, p.features - k0));
            const View<C> to{y + c * p.features + k0, p.features, 1};
            sweep<C, false>(count, int(ceil_div(nk, width<C>)), n, {g, together, 1},
                            h + (j * rows + r) * lanes<C>, lanes<C>, 0,
                            r ? View<const C>{to.data, to.row, 1} : View<const C>{}, to, nk);
          }
        }
        r += together;
      } while (r < rows);
    }
  });
}

}  // namespace hyperfast::HF_ISA
