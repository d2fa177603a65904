// Threads and scratch memory, typed, and a little arithmetic of sizes.
#pragma once

#include "kernels.h"
#include "torch/threads.h"

namespace hyperfast::HF_ISA {

template <class F>
static void parallel(Index n, Index grain, const F& body) {
  run_parallel(
      n, grain, [](Index begin, Index end, void* f) { (*static_cast<const F*>(f))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

template <class T>
static inline T* scratch(Slot slot, Index n) {
  return static_cast<T*>(hyperfast::scratch(slot, std::size_t(n) * sizeof(T)));
}

// Own versions: an out-of-line copy of a std template from this build could be linked into another.
static inline Index min(Index a, Index b) { return a < b ? a : b; }
static constexpr Index max(Index a, Index b) { return a < b ? b : a; }
static inline Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
static inline Index round_up(Index a, Index b) { return ceil_div(a, b) * b; }

}  // namespace hyperfast::HF_ISA
