// What kernels need from the outside: threads and scratch memory. Declared here as plain functions
// so that the files built for one instruction set instantiate no shared template (threads.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace hyperfast {

// Calls body(begin, end, context) over [0, n) from torch's own thread pool, at least `grain` items
// a call; n <= grain runs on the calling thread. What the body throws arrives as
// std::runtime_error.
void run_parallel(std::int64_t n, std::int64_t grain,
                  void (*body)(std::int64_t, std::int64_t, void*), void* context);

int thread_count();

// 64-byte aligned memory of this thread, at least `bytes` long and uninitialised. Each slot is one
// buffer, kept for the next call: asking for the same slot again may move it.
enum class Slot {
  // of the thread that calls the op
  rows_a,
  rows_b,
  rows_out,
  head,
  features,
  sums,
  hidden_a,
  hidden_b,
  hidden_c,
  networks,
  gradients,
  formed,
  head_sums,
  feature_rows,
  transposed_a,
  transposed_b,
  recomputed,
  trunk,
  trunk_gradient,
  // of each thread at work, from `panel` on
  panel,
  block,
  local_a,
  local_b,
  local_c,
  local_d,
  plain,
  count
};
void* scratch(Slot slot, std::size_t bytes);

// Frees the buffers of this thread, of the slots from `first` on, that are larger than what is
// worth keeping (10 MiB).
void trim_scratch(Slot first = Slot{});

}  // namespace hyperfast
