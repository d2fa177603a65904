// Gradients with respect to what generates the weights. All are sums of products with the gradient
// of the generated weights, G_b, which is formed once for a block of tasks and a run of weights and
// used from the cache: G (tasks, P) times the head's weight (P, K), G^T times h (tasks, K), and its
// sum over the tasks. Threads share what each of these makes, never a sum, so their number does not
// show in the result.
#pragma once

#include "isa/layer/contract_grad.h"
#include "isa/layer/contract_grad_amx.h"
#include "isa/layer/formed.h"

namespace hyperfast::HF_ISA {

// How many of n rows of a product threads take at a time, where there are so many products.
static inline Index share_of_rows(Index n, Index products) {
  const Index share = ceil_div(n * products, 4 * thread_count());
  return min(max(min(round_up(share, tile_rows), task_block), tile_rows), n);
}

// ---- with respect to h ----

// A run of the head's weight widened and put into a panel of lanes along the features.
template <class T>
static void pack_run(const HyperLinearGrad& p, const Run& run, Index k0, Acc<T>* dst) {
  using C = Acc<T>;
  const HeadMatrix& m = run.vector ? p.vector : p.matrix;
  const T* from = static_cast<const T*>(m.weight) + run.o0 * m.out_stride + run.i0 * m.in_stride +
                  k0 * m.feature;
  const Index nk = min(lanes<C>, p.features - k0);
  // Along the side whose weights are nearer to each other.
  if (run.ni == 1 || m.out_stride < m.in_stride)
    for (Index i = 0; i < run.ni; ++i)
      pack<C, T>(run.no, nk, {from + i * m.in_stride, m.out_stride, m.feature}, dst + i * lanes<C>,
                 run.ni * lanes<C>, lanes<C>);
  else
    for (Index o = 0; o < run.no; ++o)
      pack<C, T>(run.ni, nk, {from + o * m.out_stride, m.in_stride, m.feature},
                 dst + o * run.ni * lanes<C>, lanes<C>, lanes<C>);
}

// y (n, nk) (+)= G times features [k0, k0 + nk) of a run of the head's weight as it lies.
template <class T>
static void use_run(const HyperLinearGrad& p, const Formed<Acc<T>>& f, Index u, Index n, Index k0,
                    Index nk, bool add, View<Acc<T>> y) {
  using C = Acc<T>;
  const Run& run = f.run;
  const HeadMatrix& m = run.vector ? p.vector : p.matrix;
  const T* from = static_cast<const T*>(m.weight) + run.o0 * m.out_stride + run.i0 * m.in_stride +
                  k0 * m.feature;
  // Whole rows of a matrix that lies row by row are one stretch of equal steps.
  const bool one = run.ni == 1 || run.no == 1 || m.out_stride == run.ni * m.in_stride;
  const Index step = run.ni == 1 ? m.out_stride : m.in_stride;
  const Index size = one ? run.size() : run.ni;
  C* part = scratch<C>(Slot::local_d, n * nk);
  for (Index q = 0; q < run.size(); q += size)
    for (Index k = 0; k < size; k += few_products, add = true) {
      const T* rows = from + (one ? 0 : q / size * m.out_stride) + k * step;
      multiply<C, T>(n, nk, min(few_products, size - k), {f.g + u * f.row + q + k, f.row, 1},
                     {rows, step, m.feature}, {}, {part, nk, 1});
      add_part<C>(n, nk, part, nk, add, y);
    }
}

// y (pieces, features) (+)= G times the head's weight. `packed` has room for a run of it; without,
// it is read as it lies.
template <class T>
static void add_grad_of_features(const HyperLinearGrad& p, const Formed<Acc<T>>& f, Acc<T>* packed,
                                 bool add, View<Acc<T>> y) {
  using C = Acc<T>;
  const Index panels = ceil_div(p.features, lanes<C>), size = f.run.size();
  const Index panel = size * lanes<C>;
  if (packed)
    parallel(panels, max(parallel_work / (8 * panel), 1), [&](Index first, Index last) {
      for (Index j = first; j < last; ++j) pack_run<T>(p, f.run, j * lanes<C>, packed + j * panel);
    });
  // Threads share tasks and panels; what lies in rows is read by as many panels as there may be.
  const Index each = share_of_rows(f.n, panels), blocks = ceil_div(f.n, each);
  const Index together = packed ? 1 : max(ceil_div(panels * blocks, 2 * Index(thread_count())), 1);
  const Index groups = ceil_div(panels, together), work = each * together * panel;
  parallel(blocks * groups, max(parallel_work / max(work, 1), 1), [&](Index first, Index last) {
    for (Index j = first; j < last; ++j) {
      const Index u = j / groups * each, n = min(each, f.n - u), i = j % groups * together;
      const Index k0 = i * lanes<C>, nk = min(together * lanes<C>, p.features - k0);
      const View<C> to = y.at(f.first + u, k0);
      if (packed)
        sweep_sums<C>(n, int(ceil_div(nk, width<C>)), size, {f.g + u * f.row, f.row, 1},
                      packed + i * panel, add, to, int(nk));
      else
        use_run<T>(p, f, u, n, k0, nk, add, to);
    }
  });
}

// ---- with respect to the head's weight and bias ----

// The features of all tasks: in panels of lanes, where there are at least as many of them as a
// vector holds; else as rows, and lanes go along the head's rows.
template <class C>
struct TaskFeatures {
  const C* data;
  Index tasks, features, lead;  // elements from one task to the next
  bool few;

  const C* at(Index panel, Index task) const { return data + (panel * tasks + task) * lead; }
};

template <class T>
static TaskFeatures<Acc<T>> pack_features(const HyperLinearGrad& p) {
  using C = Acc<T>;
  const Index tasks = p.groups.pieces;
  const bool few = p.features < width<C>;
  const Index panels = few ? 1 : ceil_div(p.features, lanes<C>);
  const Index lead = few ? max(p.features, 1) : lanes<C>;
  C* h = scratch<C>(Slot::features, max(tasks * panels * lead, 1));
  parallel(tasks, max(parallel_work / (8 * panels * lead), 1), [&](Index first, Index last) {
    for (Index u = first; u < last; ++u) {
      const T* from = static_cast<const T*>(p.h.data) + piece(p.groups, u).task * p.h.task;
      for (Index j = 0; j < panels; ++j)
        for (Index l = 0, k = j * lead; l < lead; ++l, ++k)
          h[(j * tasks + u) * lead + l] = k < p.features ? widen(from[k * p.h.col]) : 0;
    }
  });
  return {h, tasks, p.features, lead, few};
}

// weight (P, features) and bias (P), either of which may be null, (+)= G^T times h, and times 1.
template <class C>
static void add_grad_of_head(const HyperLinearGrad& p, const Formed<C>& f, const TaskFeatures<C>& h,
                             bool add, C* weight, C* bias) {
  const Index at = f.run.vector ? p.out * p.in + f.run.o0 : f.run.o0 * p.in + f.run.i0;
  const Index panels = ceil_div(h.features, lanes<C>), size = f.run.size();
  const Index each = share_of_rows(size, 1), work = each * f.n * (h.features + 1);
  parallel(ceil_div(size, each), max(parallel_work / max(work, 1), 1),
           [&](Index first, Index last) {
             for (Index j = first; j < last; ++j) {
               const Index q = j * each, n = min(each, size - q);
               const View<const C> g{f.g + q, 1, f.row};  // (P, tasks)
               if (bias) {
                 C* sum = bias + at + q;
                 if (!add)
                   for (Index l = 0; l < n; ++l) sum[l] = 0;
                 add_rows<C>(f.n, n, g.data, f.row, sum);
               }
               if (!weight) continue;
               const View<C> to{weight + (at + q) * h.features, h.features, 1};
               const View<const C> before{add ? to.data : nullptr, to.row, 1};
               if (h.few) {
                 multiply<C, C>(h.features, n, f.n, {h.at(0, f.first), 1, h.lead}, g.transposed(),
                                before.transposed(), to.transposed());
                 continue;
               }
               for (Index i = 0; i < panels; ++i) {
                 const Index k0 = i * lanes<C>, nk = min(lanes<C>, h.features - k0);
                 sweep_deep<C>(n, int(ceil_div(nk, width<C>)), f.n, g, h.at(i, f.first),
                               add ? before.at(0, k0) : before, to.at(0, k0), int(nk));
               }
             }
           });
}

// ---- all of them ----

// Where the gradients of the head add up: in place, if there is nothing to round.
template <class T>
struct HeadSums {
  using C = Acc<T>;
  C *weight = nullptr, *bias = nullptr;

  explicit HeadSums(const HyperLinearGrad& p) {
    if constexpr (std::is_same_v<T, C>) {
      weight = static_cast<T*>(p.grad_weight);
      bias = static_cast<T*>(p.grad_bias);
    } else {
      const Index size = p.grad_weight ? p.params() * p.features : 0;
      C* sums = scratch<C>(Slot::head_sums, max(size + (p.grad_bias ? p.params() : 0), 1));
      if (p.grad_weight) weight = sums;
      if (p.grad_bias) bias = sums + size;
    }
  }
  void start(const HyperLinearGrad& p) const {
    for (Index j = 0; weight && j < p.params() * p.features; ++j) weight[j] = 0;
    for (Index j = 0; bias && j < p.params(); ++j) bias[j] = 0;
  }
  void finish(const HyperLinearGrad& p) const {
    round_off<T>(weight, p.params() * p.features, p.grad_weight);
    round_off<T>(bias, p.params(), p.grad_bias);
  }
};

// The features of all tasks as rows.
template <class T>
static const Acc<T>* feature_rows(const HyperLinearGrad& p) {
  Acc<T>* h = scratch<Acc<T>>(Slot::feature_rows, max(p.groups.pieces * p.features, 1));
  for (Index u = 0; u < p.groups.pieces; ++u)
    copy_features<T>(p.h, piece(p.groups, u).task, p.features, false, h + u * p.features);
  return h;
}

// G formed once; grad_h (pieces, features) may be null.
template <class T>
static void grad_by_runs(HyperLinearGrad p, Staged<const Acc<T>> grad, Staged<const Acc<T>> x,
                         Acc<T>* grad_h) {
  using C = Acc<T>;
  const bool fixed = p.grad_weight || p.grad_bias || p.has_bias;  // the order of parameters
  if (!fixed && p.matrix.out_stride < p.matrix.in_stride) {       // as the head lies
    p.matrix = p.matrix.transposed();
    std::swap(p.out, p.in);
    std::swap(grad, x);
  }
  const Index tasks = p.groups.pieces, block = formed_tasks(tasks, total_rows(p.groups));
  const Runs runs(p.out, p.in, p.has_bias, formed_elements<C> / block);
  const Index row = runs.longest() + 16;  // a line more against cache conflicts
  C* g = scratch<C>(Slot::formed, min(block, tasks) * row);
  C* packed = nullptr;
  if (grad_h && min(block, tasks) > 4 * tile_rows)  // fewer do not make up for it
    packed = scratch<C>(Slot::head, runs.longest() * round_up(p.features, lanes<C>));
  const TaskFeatures<C> h = p.grad_weight ? pack_features<T>(p) : TaskFeatures<C>{};
  const C* h_rows = p.transform == Transform::none ? nullptr : feature_rows<T>(p);
  const HeadSums<T> sums(p);
  if (tasks == 0) sums.start(p);
  for (Index first = 0; first < tasks; first += block)
    for (Index q = 0; q < runs.total; ++q) {
      const Formed<C> f{runs[q], first, min(block, tasks - first), g, row};
      form_all<C>(p, f, grad, x);
      if (h_rows && !f.run.vector) times_slope<T>(p, f, h_rows);
      if (grad_h) add_grad_of_features<T>(p, f, packed, q > 0, {grad_h, p.features, 1});
      if (sums.weight || sums.bias) add_grad_of_head<C>(p, f, h, first > 0, sums.weight, sums.bias);
    }
  sums.finish(p);
}

// All rows of all tasks as one matrix, if they lie at equal steps; else its data is null.
template <class C>
static View<const C> all_rows(const Staged<const C>& rows, const Groups& g) {
  if (g.ragged || rows.task == g.rows * rows.row) return {rows.data, rows.row, rows.col};
  return {g.rows == 1 ? rows.data : nullptr, rows.task, rows.col};
}

// The sum of G over the tasks as that of all rows, which takes no G of each. False where the rows
// are no matrix.
template <class T>
static bool grad_of_bias(const HyperLinearGrad& p, const Staged<const Acc<T>>& staged_grad,
                         const Staged<const Acc<T>>& staged_x) {
  using C = Acc<T>;
  const View<const C> grad = all_rows<C>(staged_grad, p.groups),
                      x = all_rows<C>(staged_x, p.groups);
  if (!grad.data || !x.data) return false;
  const Index share = round_up(ceil_div(p.out, 4 * thread_count()), tile_rows);
  const Runs runs(p.out, p.in, p.has_bias, min(block_elements<C> / 16, max(share * p.in, share)));
  const Index rows = total_rows(p.groups), work = runs.longest() * (rows + 1);
  parallel(runs.total, max(parallel_work / work, 1), [&](Index first, Index last) {
    C* const g = scratch<C>(Slot::block, 2 * runs.longest());
    C* const part = g + runs.longest();
    for (Index q = first; q < last; ++q) {
      const Run run = runs[q];
      form<C>(run, min(few_products, rows), grad, x, g);
      for (Index r = few_products; r < rows; r += few_products) {
        form<C>(run, min(few_products, rows - r), grad.at(r, 0), x.at(r, 0), part);
        add_part<C>(1, run.size(), part, run.size(), true, {g, run.size(), 1});
      }
      const Index at = run.vector ? p.out * p.in + run.o0 : run.o0 * p.in + run.i0;
      for (Index j = 0; j < run.size(); ++j) static_cast<T*>(p.grad_bias)[at + j] = narrow<T>(g[j]);
    }
  });
  return true;
}

// The same by lanes of tasks; their sum has been found before.
template <class T>
static void grad_by_lanes(const HyperLinearGrad& p, const Staged<const Acc<T>>& grad,
                          const Staged<const Acc<T>>& x, Acc<T>* grad_h) {
  using C = Acc<T>;
  const Transposed<C> turned_grad = transpose_rows<C>(grad, p.groups, p.out, Slot::transposed_a),
                      turned_x = transpose_rows<C>(x, p.groups, p.in, Slot::transposed_b);
  if (grad_h) grad_h_contract<T>(p, turned_grad, turned_x, grad_h);
  const HeadSums<T> sums(p);
  if (sums.weight) grad_weight_contract<T>(p, turned_grad, turned_x, sums.weight);
  sums.finish(p);
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
  const bool linear = p.transform == Transform::none;
  const bool contract = linear && p.plan == Plan::contract && (grad_h || p.grad_weight);
#ifdef HF_MATRIX_UNIT
  if constexpr (std::is_same_v<C, float>)
    if (contract && grad_on_matrix_unit<T>(p, grad, x, grad_h, add)) return;
#endif
  const bool alone = contract || !(grad_h || p.grad_weight);
  if (p.grad_bias && linear && alone && grad_of_bias<T>(p, grad, x)) p.grad_bias = nullptr;
  const bool by_lanes = contract && (grad_h || p.features >= width<C>);
  const Index count = by_lanes ? Units(p.groups).count : p.groups.pieces;
  const bool direct = !add && !p.groups.ragged && count == p.groups.tasks;
  C* parts = nullptr;
  if (grad_h) parts = direct ? grad_h : scratch<C>(Slot::sums, max(count * p.features, 1));
  HyperLinearGrad rest = p;
  if (by_lanes) {
    p.grad_bias = nullptr;
    if (p.features >= width<C>)
      rest.grad_weight = nullptr;
    else
      p.grad_weight = nullptr;
    grad_by_lanes<T>(p, grad, x, parts);
  }
  C* rest_h = by_lanes ? nullptr : parts;
  if (rest_h || rest.grad_weight || rest.grad_bias) grad_by_runs<T>(rest, grad, x, rest_h);
  if (grad_h && !direct) sum_units<C>(p, !by_lanes, 1, parts, grad_h, add);
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
