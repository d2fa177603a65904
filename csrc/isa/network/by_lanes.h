// A network all of whose layers contract: a block of tasks goes through them at once, and what one
// makes in lanes is what the next one takes.
#pragma once

#include "isa/layer/generated.h"
#include "isa/network/activate.h"
#include "isa/network/layer_of.h"

namespace hyperfast::HF_ISA {

// Outputs of a block, rounded, go where they belong among the contiguous rows of a call.
template <class T>
static void store_outputs(const Groups& g, Index first, Index n, Index out,
                          const LaneBlock<Acc<T>>& b, T* to) {
  using C = Acc<T>;
  const Index size = n * b.rows * out;
  C* const rows = scratch<C>(Slot::local_a, max(size, 1));
  outputs_from_lanes(b, n, out, rows);
  if (!g.ragged) return convert(size, rows, to + first * b.rows * out);
  for (Index l = 0; l < n; ++l) convert(out, rows + l * out, to + g.order[first + l] * out);
}

template <class T>
static void hyper_mlp_by_lanes(const HyperMlp& p) {
  using C = Acc<T>;
  const Layer* const layers = p.net.layers;
  const Index most = p.net.widest;
  each_block<T>(p.groups, p.h, p.features, p.head.feature, p.net.params, most, most,
                [&](const Units& units, Index first, Index n, LaneBlock<C> b, C* x) {
                  inputs_in_lanes(b, first, n, layers[0].in, p.x.col, x,
                                  [&](Index unit, Index r) { return units.row<T>(p.x, unit, r); });
                  T* kept = static_cast<T*>(p.preactivations);
                  for (Index l = 0; l < p.net.count; ++l) {
                    const Layer& layer = layers[l];
                    contract_block<T>(layer_of<T>(p, layer, Plan::contract), nullptr, b);
                    if (kept && layer.kept) {
                      store_outputs<T>(p.groups, first, n, layer.out, b, kept);
                      kept += total_rows(p.groups) * layer.out;
                    }
                    for (Index j = 0; j < b.rows * layer.out; ++j) {
                      C* const y = b.y + j * b.row;
                      activate<C>(layer, b.vecs * width<C>, y, y);
                    }
                    if (l + 1 == p.net.count) break;
                    std::swap(x, b.y);
                    b.x = x;
                  }
                  store_outputs<T>(p.groups, first, n, layers[p.net.count - 1].out, b,
                                   static_cast<T*>(p.y.data));
                });
}

static inline bool runs_by_lanes(const HyperMlp& p) {
  for (Index l = 0; l < p.net.count; ++l) {
    const Layer& layer = p.net.layers[l];
    const bool unit = has_matrix_unit && suits_matrix_unit(Makes::weights, p.dtype, p.groups,
                                                           layer.params(), p.features);
    if (unit || plan_of(p, layer) != Plan::contract) return false;
  }
  return true;
}

}  // namespace hyperfast::HF_ISA
