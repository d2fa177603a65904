// The head's weight, packed into panels: what a block of tasks multiplies its features with.
#pragma once

#include "isa/rows/staged.h"

namespace hyperfast::HF_ISA {

// Tasks whose weights are alive at once. So many use a panel from the third-level cache before the
// next: with 12, streaming the panels took longer than multiplying with them.
constexpr Index task_block = 8 * tile_rows;

// Elements of a block's generated weights (or of their gradient): 400 KiB, less than half of the
// second level, and enough for 48 tasks of 64 outputs and 33 inputs.
template <class C>
constexpr Index block_elements = (400 << 10) / Index(sizeof(C));

// Elements packed at a time for all tasks: 2 MiB, which threads share through the third-level
// cache.
template <class C>
constexpr Index head_elements = (2 << 20) / Index(sizeof(C));

// Whether heads of T, whose features are so far apart, are multiplied in pairs.
template <class T>
constexpr bool may_pair = has_pair_dot && std::is_same_v<T, bf16>;
template <class T>
static bool pairs_of(Index feature) {
  return may_pair<T> && feature == 1;
}

// Features of a task as a row of Acc<T>, a 1 behind them if the head has a bias.
template <class T>
static void copy_features(const TaskVector& h, Index task, Index features, bool one, Acc<T>* to) {
  const T* from = static_cast<const T*>(h.data) + task * h.task;
  if (h.col == 1)
    convert(features, from, to);
  else
    for (Index k = 0; k < features; ++k) to[k] = widen(from[k * h.col]);
  if (one) to[features] = 1;
}

// The same in pairs, a 0 at the end if their number is odd.
static inline void copy_feature_pairs(const TaskVector& h, Index task, Index features, bool one,
                                      float* to) {
  const bf16* from = static_cast<const bf16*>(h.data) + task * h.task;
  const Index all = features + one, whole = h.col == 1 ? features / 2 : 0;
  if (whole) std::memcpy(to, from, std::size_t(whole) * sizeof(bf16_pair));
  const auto entry = [&](Index k) {
    return k < features ? from[k * h.col] : narrow<bf16>(k < all ? 1.f : 0.f);
  };
  for (Index k = 2 * whole; k < all; k += 2) to[k / 2] = widen(bf16_pair{entry(k), entry(k + 1)});
}

// Rows of features, the head's or a task's, become columns, in pairs: dst (depth, lanes). Where
// there are more pairs than the features fill, their biases follow.
static inline void pack_pairs(const bf16* const* rows, const bf16* bias, Index n, Index features,
                              Index depth, float* dst) {
  constexpr Index all = lanes<float>;
  const Index whole = features / 2;
  const bf16_pair* pairs[all];
  for (Index l = 0; l < n; ++l) pairs[l] = reinterpret_cast<const bf16_pair*>(rows[l]);
  pack_lanes<float, bf16_pair>(pairs, n, whole, 1, dst, all, all);
  if (whole == depth) return;
  const bool odd = features % 2;  // then the last feature has the bias beside it
  for (Index l = 0; l < all; ++l)
    dst[whole * all + l] =
        widen(odd && l < n ? bf16_pair{rows[l][features - 1], bias[l]} : bf16_pair{bias[l], {}});
}

// A bias that all tasks share, (out), or null.
template <class T>
static const Acc<T>* shared_bias(const HyperLinear& p) {
  if (p.vector.weight || !p.vector.bias) return nullptr;
  Acc<T>* to = scratch<Acc<T>>(Slot::sums, max(p.out, 1));
  const T* from = static_cast<const T*>(p.vector.bias);
  for (Index o = 0; o < p.out; ++o) to[o] = widen(from[o * p.vector.bias_out_stride]);
  return to;
}

}  // namespace hyperfast::HF_ISA
