// The gradients of contract.h: rows are lanes again. A row's share of the gradient of its task's
// weights, G[p][row] = grad[o][row] * x[i][row] for p = (o, i), is formed a panel at a time and
// used from there.
#pragma once

#include "isa/layer/contract.h"

namespace hyperfast::HF_ISA {

// Parameters of a panel of G. A strip of features touches one line of each of their rows of the
// head: these lines, a row apart, fall into few sets of the first-level cache, which they share
// with the panel.
static inline Index panel_depth(Index features) {
  return max(min(6144 / max(features, 1), 96) / 16, 2) * 16;
}

// So many products at most are added up in a row where the sum is over the parameters, or over all
// rows: sums of sums lose fewer digits.
constexpr Index few_products = 256;

// Rows turned around, a vector of units at a time, the last one padded with zeros: what a panel
// reads of a vector is one stretch. With columns of all units, whose steps are powers of two where
// their number is, panels took 20% of the time instead of 5 (1,024 units of 64-64, 64 features).
template <class C>
struct Transposed {
  const C* data;
  Index columns, rows;  // of a unit

  // Column `column` of row r of the vector of units that begins with `unit`; the next one follows.
  const C* at(Index column, Index unit, Index r) const {
    return data + ((unit / width<C> * rows + r) * columns + column) * width<C>;
  }
};

template <class C>
static Transposed<C> transpose_rows(const Staged<const C>& rows, const Groups& g, Index columns,
                                    Slot slot) {
  const Units units(g);
  constexpr Index w = width<C>;
  const Index vecs = ceil_div(units.count, w), size = columns * w;
  C* to = scratch<C>(slot, max(vecs * units.rows * size, 1));
  parallel(vecs * units.rows, max(parallel_work / max(16 * columns, 1), 1),
           [&](Index begin, Index end) {
             for (Index j = begin; j < end; ++j) {
               const Index r = j % units.rows, first = j / units.rows * w,
                           n = min(w, units.count - first);
               const C* from[w];
               for (Index l = 0; l < n; ++l) from[l] = units.row(rows, first + l, r);
               pack_lanes<C, C>(from, n, columns, rows.col, to + j * size, w, w);
             }
           });
  return {to, columns, units.rows};
}

// Of a task, the sum of what all parts (n, units, features) have for its units, which are next to
// each other; added to what is in grad_h (tasks, features), if `add`. A task without rows has none.
template <class C>
static void sum_units(const HyperLinearGrad& p, bool by_piece, Index n, const C* parts, C* grad_h,
                      bool add) {
  const Groups& g = p.groups;
  const Index count = by_piece ? g.pieces : Units(g).count, each = by_piece ? g.per_task : 1;
  // Where the units of a task are is known at once only without task_ids.
  const Index grain = g.ragged ? g.tasks : parallel_work / 8 / max(n * each * p.features, 1);
  parallel(g.tasks, max(grain, 1), [&](Index begin, Index end) {
    Units units(g);
    Index j = begin * each;
    for (Index t = begin; t < end; ++t) {
      C* sum = grad_h + t * p.features;
      if (!add)
        for (Index k = 0; k < p.features; ++k) sum[k] = 0;
      for (; j < count && (by_piece ? piece(g, j).task : units.task(j)) == t; ++j)
        for (Index i = 0; i < n; ++i)
          for (Index k = 0; k < p.features; ++k) sum[k] += parts[(i * count + j) * p.features + k];
    }
  });
}

// Where a gradient (size) adds up before it is rounded to T: where it goes, if there is nothing to
// round.
template <class T>
static Acc<T>* accumulator(void* gradient, Index size) {
  if constexpr (std::is_same_v<T, Acc<T>>)
    return static_cast<T*>(gradient);
  else
    return gradient ? scratch<Acc<T>>(Slot::gradients, max(size, 1)) : nullptr;
}
template <class T>
static void round_off(const Acc<T>* sums, Index size, void* gradient) {
  if constexpr (!std::is_same_v<T, Acc<T>>)
    if (gradient) add_up<T>(1, size, sums, static_cast<T*>(gradient));
}

// G of parameters [p, p + count), for `vecs` vectors of units from `unit` on; `to` has `lead` lanes
// a parameter. The head's rows are those of the matrix, then those of the vector, whose input is 1.
template <class C>
static void form_panel(const Transposed<C>& grad, const Transposed<C>& x, Index p, Index count,
                       Index unit, int vecs, C* to, Index lead) {
  constexpr int w = width<C>;
  const Index out = grad.columns, in = x.columns;
  while (count > 0) {
    const bool vector = p >= out * in;
    const Index o = vector ? p - out * in : p / in, i = vector ? 0 : p % in;
    const Index n = vector ? 1 : min(in - i, count);
    for (int v = 0; v < vecs; ++v)
      for (Index r = 0; r < grad.rows; ++r) {
        const Vec<C> g = load(grad.at(o, unit + v * w, r));
        C* sum = to + v * w;
        if (vector) {
          store(sum, r ? load(sum) + g : g);
          continue;
        }
        const C* const from = x.at(i, unit + v * w, r);
        if (r == 0)
#pragma GCC unroll 4
          for (Index j = 0; j < n; ++j, sum += lead) store(sum, g * load(from + j * w));
        else
#pragma GCC unroll 4
          for (Index j = 0; j < n; ++j, sum += lead) store(sum, load(sum) + g * load(from + j * w));
      }
    if (grad.rows == 0)
      for (Index j = 0; j < n * lead; ++j) to[j] = 0;
    p += n;
    count -= n;
    to += n * lead;
  }
}

// One row (features) for every unit: parts (units, features). All tiles of a block use a panel of
// the head before the next (512 units of 128-128, 128 features: 8% less with four tiles of 16).
template <class T>
static void grad_h_contract(const HyperLinearGrad& p, const Transposed<Acc<T>>& grad,
                            const Transposed<Acc<T>>& x, Acc<T>* parts) {
  using C = Acc<T>;
  const Index count = Units(p.groups).count, size = block_units<C>(count);
  const Index params = p.params();
  const Index work = size * (p.features + grad.rows) * params;
  // The vector's rows follow those of the matrix.
  const T* weight = static_cast<const T*>(p.matrix.weight);
  const Index step = p.matrix.in_stride;
  parallel(
      ceil_div(count, size), max(parallel_work / max(work, 1), 1), [&](Index begin, Index end) {
        const Index most = panel_depth(p.features), all = p.features * round_up(size, lanes<C>);
        C* const sums = scratch<C>(Slot::block, 2 * all + most * lanes<C>);
        C *const part = sums + all, *const g = part + all;
        for (Index b = begin; b < end; ++b) {
          const Index first = b * size, n = min(size, count - first);
          for (Index q = 0, summed = 0; q < params; q += most) {
            const Index depth = min(most, params - q);
            View<const C> a;
            if constexpr (std::is_same_v<C, T>) {
              a = {weight + q * step, p.matrix.feature, step};
            } else {
              C* wide = scratch<C>(Slot::local_a, max(depth * p.features, 1));
              pack<C, T>(depth, p.features, {weight + q * step, step, p.matrix.feature}, wide,
                         p.features, p.features);
              a = {wide, 1, p.features};
            }
            for (Index u = 0; u < n; u += lanes<C>) {
              const int vecs = int(ceil_div(min(lanes<C>, n - u), width<C>));
              C* const to = part + u * p.features;
              form_panel<C>(grad, x, q, depth, first + u, vecs, g, lanes<C>);
              sweep<C, false>(p.features, vecs, depth, a, g, lanes<C>, 0,
                              summed ? View<const C>{to, lanes<C>, 1} : View<const C>{},
                              {to, lanes<C>, 1}, vecs * width<C>, a.at(0, depth).data);
            }
            summed += depth;
            if (summed + most <= few_products && q + depth < params) continue;
            for (Index u = 0; u < n; u += lanes<C>) {
              const View<C> to{sums + u * p.features, lanes<C>, 1};
              add_part<C>(p.features, round_up(min(lanes<C>, n - u), width<C>),
                          part + u * p.features, lanes<C>, q + depth > summed, to);
            }
            summed = 0;
          }
          for (Index u = 0; u < n; u += lanes<C>)
            pack<C, C>(min(lanes<C>, n - u), p.features,
                       View<const C>{sums + u * p.features, 1, lanes<C>},
                       parts + (first + u) * p.features, p.features, p.features);
        }
      });
}

// y (params, features), in the accumulation type.
template <class T>
static void grad_weight_contract(const HyperLinearGrad& p, const Transposed<Acc<T>>& grad,
                                 const Transposed<Acc<T>>& x, Acc<T>* y) {
  using C = Acc<T>;
  const Index count = Units(p.groups).count, params = p.params();
  const Index panels = ceil_div(p.features, lanes<C>);
  // h as it lies, if its rows are whole vectors; else packed into panels.
  View<const C> h{static_cast<const C*>(p.h.data), p.h.task, 1};
  Index h_panel = lanes<C>;  // from one panel to the next
  if (!std::is_same_v<C, T> || p.groups.ragged || p.h.col != 1 || p.features % width<C>) {
    C* packed = scratch<C>(Slot::features, max(count * panels * lanes<C>, 1));
    parallel(count, max(parallel_work / (8 * panels * lanes<C>), 1), [&](Index begin, Index end) {
      Units units(p.groups);
      for (Index u = begin; u < end; ++u) {
        const T* from = static_cast<const T*>(p.h.data) + units.task(u) * p.h.task;
        for (Index j = 0; j < panels; ++j)
          for (Index l = 0, k = j * lanes<C>; l < lanes<C>; ++l, ++k)
            packed[(j * count + u) * lanes<C> + l] = k < p.features ? widen(from[k * p.h.col]) : 0;
      }
    });
    h = {packed, lanes<C>, 1};
    h_panel = count * lanes<C>;
  }
  // Units at a time, so that their features stay in the first-level cache (32 KiB), with G of so
  // many parameters (at most 12 KiB). Sums of a run of parameters stay in the second level. They do
  // not run along it, so the number of threads does not show in the result.
  const Index together = max(min(8192 / (panels * lanes<C>), 128) / 32, 1) * 32;  // whole vectors
  constexpr Index few = 4 * tile_rows;
  const Index most = max(block_elements<C> / max(p.features, 1) / few, 1) * few;
  const Index run = min(most, round_up(ceil_div(params, 4 * thread_count()), few));
  const Index work = run * count * (p.features + grad.rows);
  parallel(
      ceil_div(params, run), max(parallel_work / max(work, 1), 1), [&](Index begin, Index end) {
        C* g = scratch<C>(Slot::block, few * together);
        for (Index q = begin * run; q < min(end * run, params); q += run) {
          const Index stop = min(q + run, params);
          Index u = 0;
          do {  // once even without units: the gradient is then zero
            const Index n = min(together, count - u);
            for (Index c = q; c < stop; c += few) {
              const Index some = min(few, stop - c);
              form_panel<C>(grad, x, c, n ? some : 0, u, int(ceil_div(n, width<C>)), g, together);
              for (Index j = 0; j < panels; ++j) {
                const Index k0 = j * lanes<C>;
                const int nk = int(min(lanes<C>, p.features - k0));
                const View<C> to{y + c * p.features + k0, p.features, 1};
                sweep<C, false>(some, int(ceil_div(nk, width<C>)), n, {g, together, 1},
                                h.data + j * h_panel + u * h.row, h.row, 0,
                                u ? View<const C>{to.data, to.row, 1} : View<const C>{}, to, nk);
              }
            }
            u += together;
          } while (u < count);
        }
      });
}

}  // namespace hyperfast::HF_ISA
