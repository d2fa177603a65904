// The head's weight, packed into panels: what a block of tasks multiplies its features with.
#pragma once

#include "staged.h"

namespace hyperfast::HF_ISA {

// Tasks whose weights are alive at once. So many use a panel from the third-level cache before the next:
// with 12, streaming the panels took longer than multiplying with them.
constexpr Index task_block = 8 * tile_rows;

// Elements of a block's generated weights (or of their gradient): 400 KiB, less than half of the second
// level, and enough for 48 tasks of 64 outputs and 33 inputs.
template <class C>
constexpr Index block_elements = (400 << 10) / Index(sizeof(C));

// Elements packed at a time for all tasks: 2 MiB, which threads share through the third-level cache.
template <class C>
constexpr Index head_elements = (2 << 20) / Index(sizeof(C));

// dst[k][l] = src[l][k * step] for k < depth, l < n; zeros for n <= l < all. Rows of dst are dst_row apart.
template <class C, class T>
static void pack_lanes(const T* const* src, Index n, Index depth, Index step, C* dst, Index dst_row,
                       Index all) {
  constexpr int w = width<C>;
  Index l = 0;
  for (; step == 1 && l + w <= n; l += w) {
    Index k = 0;
    for (; k + w <= depth; k += w) {
      Vec<C> block[w];
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) block[i] = load_wide(src[l + i] + k);
      transpose<C>(block);
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) store(dst + (k + i) * dst_row + l, block[i]);
    }
    for (; k < depth; ++k)
      for (int i = 0; i < w; ++i) dst[k * dst_row + l + i] = widen(src[l + i][k]);
  }
  for (; l < n; ++l)
    for (Index k = 0; k < depth; ++k) dst[k * dst_row + l] = widen(src[l][k * step]);
  for (; l < all; ++l)
    for (Index k = 0; k < depth; ++k) dst[k * dst_row + l] = 0;
}

// Features of a task as a row of Acc<T>, a 1 behind them if the head has a bias.
template <class T>
static void copy_features(const TaskVector& h, Index task, Index features, bool one, Acc<T>* to) {
  const T* from = static_cast<const T*>(h.data) + task * h.task;
  for (Index k = 0; k < features; ++k) to[k] = widen(from[k * h.col]);
  if (one) to[features] = 1;
}

// The same in pairs, a 0 at the end if their number is odd.
static inline void copy_feature_pairs(const TaskVector& h, Index task, Index features, bool one,
                                      float* to) {
  const bf16* from = static_cast<const bf16*>(h.data) + task * h.task;
  const Index all = features + one;
  const auto entry = [&](Index k) {
    return k < features ? from[k * h.col] : narrow<bf16>(k < all ? 1.f : 0.f);
  };
  for (Index k = 0; k < all; k += 2) to[k / 2] = widen(bf16_pair{entry(k), entry(k + 1)});
}

}  // namespace hyperfast::HF_ISA
