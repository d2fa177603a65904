// Threads and scratch memory, typed, and a little arithmetic of sizes.
#pragma once

#include "kernels.h"
#include "torch/threads.h"

namespace hyperfast::HF_ISA {

// Calls body(work) once on each thread, for bodies that prepare something for all they do.
template <class F>
static void each_thread(Index n, Index grain, const F& body) {
  run_parallel(
      n, grain, [](Work& work, void* f) { (*static_cast<const F*>(f))(work); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Calls body(begin, end) for parts of [0, n), in any order and of any size.
template <class F>
static void parallel(Index n, Index grain, const F& body) {
  each_thread(n, grain, [&](Work& work) {
    for (Index begin, end; work.take(begin, end);) body(begin, end);
  });
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
