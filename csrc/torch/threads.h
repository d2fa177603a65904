// What kernels need from the outside: threads and scratch memory. Declared here as plain functions
// so that the files built for one instruction set instantiate no shared template (threads.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace hyperfast {

struct Share;

// What a thread finds to do of the indices [0, n). It takes half of what is left of its own share
// at a time, and then of the next ones: a core that is slower for a while, or comes late, leaves
// the rest of its share to others.
class Work {
 public:
  // Of so many shares the thread's own is number `own`; at least so many indices are taken at once.
  Work(Share* shares, std::int64_t count, std::int64_t own, std::int64_t least)
      : shares_(shares), count_(count), own_(own), least_(least) {}
  // The next indices, [begin, end); false where none are left.
  bool take(std::int64_t& begin, std::int64_t& end);

 private:
  Share* shares_;
  std::int64_t count_, own_, least_;
  std::int64_t done_ = 0;  // shares of which nothing is left
};

// Calls body(work, context) on each thread of torch's own pool for which there are `grain` of the
// indices; n <= grain is taken at once, on the calling thread, as is all that threads at work call.
// What the body throws on one of several threads arrives as std::runtime_error.
void run_parallel(std::int64_t n, std::int64_t grain, void (*body)(Work&, void*), void* context);

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
