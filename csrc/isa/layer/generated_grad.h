// Gradients with respect to what generates the weights. Both are matrix products with the gradient
// of the generated weights, G_b = sum over rows of grad[r] (x) x[r], which is formed a block at a
// time and used from the cache: G (tasks, P) times the head's weight (P, K), and G^T times h
// (tasks, K).
#pragma once

#include "isa/layer/contract_grad.h"
#include "isa/layer/contract_grad_amx.h"

namespace hyperfast::HF_ISA {

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

// g (no, ni) row-major = sum over the m rows of grad (x) x, for the run's outputs and inputs.
template <class C>
static void form(const Run& run, Index m, View<const C> grad, View<const C> x, C* g) {
  static const C one = 1;
  grad = grad.at(0, run.o0);
  x = run.vector ? View<const C>{&one, 0, 0} : x.at(0, run.i0);
  if (run.ni < run.no &&
      (m > 1 || run.vector)) {  // lanes along the longer side; one row's g is written as it lies
    multiply<C, C>(run.ni, run.no, m, x.transposed(), grad, {}, {g, 1, run.ni});
  } else {
    multiply<C, C>(run.no, run.ni, m, grad.transposed(), x, {}, {g, run.ni, 1});
  }
}

// ---- with respect to h ----

// Runs of the head's weight widened and put into panels of lanes along the features.
template <class T>
static void pack_run(const HyperLinearGrad& p, const Run& run, Index k0, Acc<T>* dst) {
  using C = Acc<T>;
  const HeadMatrix& m = run.vector ? p.vector : p.matrix;
  const Index nk = min(lanes<C>, p.features - k0);
  for (Index o = 0; o < run.no; ++o) {
    const T* rows =
        static_cast<const T*>(m.weight) + (run.o0 + o) * m.out_stride + run.i0 * m.in_stride;
    pack<C, T>(run.ni, nk, {rows + k0 * m.feature, m.in_stride, m.feature},
               dst + o * run.ni * lanes<C>, lanes<C>, lanes<C>);
  }
}

// y (+)= g times a run of the head's weight as it lies.
template <class T>
static void use_run(const HyperLinearGrad& p, const Run& run, Index tasks, View<const Acc<T>> g,
                    bool add, View<Acc<T>> y) {
  using C = Acc<T>;
  const HeadMatrix& m = run.vector ? p.vector : p.matrix;
  const T* rows = static_cast<const T*>(m.weight) + run.o0 * m.out_stride + run.i0 * m.in_stride;
  // The vector's outputs, and whole rows of the matrix, are one stretch of equal steps.
  const Index step = run.vector ? m.out_stride : m.in_stride;
  C* part = scratch<C>(Slot::local_d, max(tasks * p.features, 1));
  for (Index k = 0; k < run.size(); k += few_products) {
    multiply<C, T>(tasks, p.features, min(few_products, run.size() - k), g.at(0, k),
                   {rows + k * step, step, m.feature}, {}, {part, p.features, 1});
    add_part<C>(tasks, p.features, part, p.features, add || k, y);
  }
}

// y (pieces, features), y.col == 1.
template <class T>
static void hyper_linear_grad_h_pieces(const HyperLinearGrad& p, const Staged<const Acc<T>>& grad,
                                       const Staged<const Acc<T>>& x, View<Acc<T>> y) {
  using C = Acc<T>;
  const Index tasks = p.groups.pieces;
  const Runs runs(p.out, p.in, p.has_bias, block_elements<C> / task_block);
  const Index panels = ceil_div(p.features, lanes<C>);
  const Index panel = runs.longest() * lanes<C>, slice = panels * panel;
  const Index together = max(min(head_elements<C> / max(slice, 1), runs.total), 1);
  const bool packs = p.plan != Plan::materialize;
  C* packed = packs ? scratch<C>(Slot::head, max(together * slice, 1)) : nullptr;

  for (Index q0 = 0; q0 < runs.total; q0 += together) {
    const Index q1 = min(q0 + together, runs.total);
    if (packs)
      parallel((q1 - q0) * panels, max(parallel_work / (8 * panel), 1),
               [&](Index first, Index last) {
                 for (Index j = first; j < last; ++j)
                   pack_run<T>(p, runs[q0 + j / panels], j % panels * lanes<C>, packed + j * panel);
               });

    const Index rows_each = ceil_div(total_rows(p.groups), max(tasks, 1));
    const Index work = tile_rows * (q1 - q0) * runs.longest() * (p.features + rows_each);
    parallel(ceil_div(tasks, tile_rows), max(parallel_work / max(work, 1), 1),
             [&](Index first, Index last) {
               const Index row = runs.longest() + 16;  // a line more against cache conflicts
               C* g = scratch<C>(Slot::block, task_block * row);
               const Index end = min(last * tile_rows, tasks);
               for (Index u0 = first * tile_rows; u0 < end; u0 += task_block) {
                 const Index nu = min(task_block, end - u0);
                 for (Index q = q0; q < q1; ++q) {
                   const Run run = runs[q];
                   for (Index u = 0; u < nu; ++u) {
                     const Piece r = piece(p.groups, u0 + u);
                     form<C>(run, r.end - r.begin, grad.of(r), x.of(r), g + u * row);
                   }
                   if (!packs) {
                     use_run<T>(p, run, nu, {g, row, 1}, q > 0, y.at(u0, 0));
                     continue;
                   }
                   for (Index j = 0; j < panels; ++j) {
                     const Index k0 = j * lanes<C>;
                     const int nk = int(min(lanes<C>, p.features - k0));
                     const View<C> out = y.at(u0, k0);
                     sweep_sums<C>(nu, int(ceil_div(nk, width<C>)), run.size(), {g, row, 1},
                                   packed + (q - q0) * slice + j * panel, q > 0, out, nk);
                   }
                 }
               }
             });
  }
}

template <class T>
static void grad_of_features(const HyperLinearGrad& p, const Staged<const Acc<T>>& grad,
                             const Staged<const Acc<T>>& x,
                             const TransposedRows<Acc<T>>* transposed, Acc<T>* grad_h, bool add) {
  using C = Acc<T>;
  const Index count = transposed ? Units(p.groups).count : p.groups.pieces;
  const bool direct = !add && !p.groups.ragged && count == p.groups.tasks;
  C* parts = direct ? grad_h : scratch<C>(Slot::sums, max(count * p.features, 1));
  if (transposed)
    grad_h_contract<T>(p, transposed->grad, transposed->x, parts);
  else
    hyper_linear_grad_h_pieces<T>(p, grad, x, {parts, p.features, 1});
  if (!direct) sum_units<C>(p, !transposed, 1, parts, grad_h, add);
}

// ---- with respect to the head's weight ----

// Tasks whose G and h a run takes at a time. With many rows a task, forming G weighs more: then
// fewer tasks and longer runs, over which the rows are read again less often.
static inline Index grad_tasks(Index rows_each) { return (rows_each < 16 ? 16 : 8) * tile_rows; }

// Runs as long as `most`, but short enough that every thread has some. Sums do not run along a run,
// so the number of threads does not show in the result.
static inline Runs shared_runs(const HyperLinearGrad& p, Index most) {
  const Index share = round_up(ceil_div(p.out, 4 * thread_count()), tile_rows);
  return {p.out, p.in, p.has_bias, min(most, max(share * p.in, share))};
}

// All rows of all tasks as one matrix, if they lie at equal steps; else its data is null.
template <class C>
static View<const C> all_rows(const Staged<const C>& rows, const Groups& g) {
  if (g.ragged || rows.task == g.rows * rows.row) return {rows.data, rows.row, rows.col};
  return {g.rows == 1 ? rows.data : nullptr, rows.task, rows.col};
}

// Where all tasks share their features (a head's bias is the weight of a feature 1), the sum over
// the tasks of G_b (x) h is the sum of all rows' products, times h. False where they do not.
template <class T>
static bool grad_of_shared_features(const HyperLinearGrad& p,
                                    const Staged<const Acc<T>>& staged_grad,
                                    const Staged<const Acc<T>>& staged_x) {
  using C = Acc<T>;
  if (p.h.task != 0 || p.groups.tasks == 0) return false;
  const View<const C> grad = all_rows<C>(staged_grad, p.groups),
                      x = all_rows<C>(staged_x, p.groups);
  if (!grad.data || !x.data) return false;
  const Runs runs = shared_runs(p, block_elements<C> / 16);
  const Index rows = total_rows(p.groups), work = runs.longest() * (rows + p.features);
  const T* h = static_cast<const T*>(p.h.data);
  parallel(runs.total, max(parallel_work / max(work, 1), 1), [&](Index first, Index last) {
    C* g = scratch<C>(Slot::block, runs.longest());
    for (Index q = first; q < last; ++q) {
      const Run run = runs[q];
      form<C>(run, rows, grad, x, g);
      const Index at = run.vector ? p.out * p.in + run.o0 : run.o0 * p.in + run.i0;
      T* y = static_cast<T*>(p.grad_weight) + at * p.features;
      for (Index j = 0; j < run.size(); ++j)
        for (Index k = 0; k < p.features; ++k)
          y[j * p.features + k] = narrow<T>(g[j] * widen(h[k * p.h.col]));
    }
  });
  return true;
}

template <class T>
static void grad_of_weight(const HyperLinearGrad& p, const Staged<const Acc<T>>& grad,
                           const Staged<const Acc<T>>& x,
                           const TransposedRows<Acc<T>>* transposed) {
  using C = Acc<T>;
  if (transposed && p.features >= width<C>) {
    const Index size = p.params() * p.features;
    if constexpr (std::is_same_v<C, T>)
      return grad_weight_contract<T>(p, transposed->grad, transposed->x,
                                     static_cast<C*>(p.grad_weight));
    C* sums = scratch<C>(Slot::sums, size);
    grad_weight_contract<T>(p, transposed->grad, transposed->x, sums);
    return add_up<T>(1, size, sums, static_cast<T*>(p.grad_weight));
  }
  const Index tasks = p.groups.pieces;
  const Index rows_each = ceil_div(total_rows(p.groups), max(tasks, 1));
  const Index block = grad_tasks(rows_each);
  const Runs runs = shared_runs(p, block_elements<C> / block);

  // Few features: lanes along the head's rows instead, and h as it is.
  const bool narrow_h = p.features < width<C>;
  const Index panels = narrow_h ? 1 : ceil_div(p.features, lanes<C>);
  const Index row = narrow_h ? max(p.features, 1) : lanes<C>;
  C* h = scratch<C>(Slot::features, max(tasks * panels * row, 1));
  parallel(tasks, max(parallel_work / (8 * panels * row), 1), [&](Index first, Index last) {
    for (Index u = first; u < last; ++u) {
      const T* from = static_cast<const T*>(p.h.data) + piece(p.groups, u).task * p.h.task;
      for (Index j = 0; j < panels; ++j)
        for (Index k = 0; k < row; ++k)
          h[(j * tasks + u) * row + k] =
              j * row + k < p.features ? widen(from[(j * row + k) * p.h.col]) : 0;
    }
  });

  const Index work = runs.longest() * tasks * (p.features + rows_each);
  parallel(runs.total, max(parallel_work / max(work, 1), 1), [&](Index first, Index last) {
    const Index g_row = runs.longest() + 16;
    C* g = scratch<C>(Slot::block, block * g_row);
    for (Index q = first; q < last; ++q) {
      const Run run = runs[q];
      const Index at = run.vector ? p.out * p.in + run.o0 : run.o0 * p.in + run.i0;
      T* y = static_cast<T*>(p.grad_weight) + at * p.features;
      C* sum;
      if constexpr (std::is_same_v<C, T>)
        sum = y;
      else
        sum = scratch<C>(Slot::local_b, max(run.size() * p.features, 1));

      Index u0 = 0;
      do {  // once even without tasks: the gradient is then zero
        const Index nu = min(block, tasks - u0);
        for (Index u = 0; u < nu; ++u) {
          const Piece r = piece(p.groups, u0 + u);
          form<C>(run, r.end - r.begin, grad.of(r), x.of(r), g + u * g_row);
        }
        const View<C> out{sum, p.features, 1};
        const View<const C> before = u0 ? View<const C>{sum, p.features, 1} : View<const C>{};
        if (narrow_h)
          multiply<C, C>(p.features, run.size(), nu, {h + u0 * row, 1, row},
                         View<const C>{g, g_row, 1}, before.transposed(), out.transposed());
        else
          for (Index j = 0; j < panels; ++j) {
            const Index k0 = j * lanes<C>;
            const int nk = int(min(lanes<C>, p.features - k0));
            sweep_deep<C>(run.size(), int(ceil_div(nk, width<C>)), nu, {g, 1, g_row},
                          h + (j * tasks + u0) * lanes<C>, before.data ? before.at(0, k0) : before,
                          out.at(0, k0), nk);
          }
        u0 += block;
      } while (u0 < tasks);

      if constexpr (!std::is_same_v<C, T>)
        for (Index j = 0; j < run.size() * p.features; ++j) y[j] = narrow<T>(sum[j]);
    }
  });
}

// grad_h, in the accumulation type, is added to what is there, if `add`.
template <class T>
static void hyper_linear_grad_typed(HyperLinearGrad p, Acc<T>* grad_h, bool add) {
  using C = Acc<T>;
  const auto grad = stage<T>(p.grad, p.groups, p.out, Slot::rows_a);
  const auto x = stage<T>(p.x, p.groups, p.in, Slot::rows_b);
  if (p.params() == 0) {  // there is nothing to add up
    for (Index j = 0; grad_h && !add && j < p.groups.tasks * p.features; ++j) grad_h[j] = 0;
    return;
  }
  if (p.grad_weight && grad_of_shared_features<T>(p, grad, x)) p.grad_weight = nullptr;
  const bool contract = p.plan == Plan::contract && (grad_h || p.grad_weight);
#ifdef __AMX_BF16__
  if constexpr (std::is_same_v<C, float>)
    if (contract && grad_on_matrix_unit<T>(p, grad, x, grad_h, add)) return;
#endif
  TransposedRows<C> transposed;
  if (contract)
    transposed = {transpose_rows<C>(grad, p.groups, p.out, Slot::transposed_a),
                  transpose_rows<C>(x, p.groups, p.in, Slot::transposed_b)};
  const TransposedRows<C>* lanes = contract ? &transposed : nullptr;
  if (grad_h) grad_of_features<T>(p, grad, x, lanes, grad_h, add);
  if (p.grad_weight) grad_of_weight<T>(p, grad, x, lanes);
  if (p.grad_bias) {  // the weight of a feature 1
    T one = narrow<T>(1);
    HyperLinearGrad bias = p;
    bias.features = 1;
    bias.h = {&one, 0, 0};
    bias.grad_weight = p.grad_bias;
    if (!grad_of_shared_features<T>(bias, grad, x)) grad_of_weight<T>(bias, grad, x, lanes);
  }
}

static void hyper_linear_grad(const HyperLinearGrad& p) {
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    const Index size = p.groups.tasks * p.features;
    Acc<T>* grad_h = accumulator<T>(p.grad_h, size);
    hyper_linear_grad_typed<T>(p, grad_h, false);
    round_off<T>(grad_h, size, p.grad_h);
  });
}

}  // namespace hyperfast::HF_ISA
