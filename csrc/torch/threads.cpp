#include "torch/threads.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#include "torch/new_memory.h"

namespace hyperfast {

using Index = std::int64_t;

struct alignas(64) Share {
  std::atomic<Index> next;
  Index end;
};

bool Work::take(Index& begin, Index& end) {
  for (; done_ < count_; ++done_) {
    Share& share = shares_[(own_ + done_) % count_];
    begin = share.next.load(std::memory_order_relaxed);
    while (begin < share.end) {
      const Index left = share.end - begin;
      end = begin + std::min(std::max((left + 1) / 2, least_), left);
      if (share.next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) return true;
    }
  }
  return false;
}

namespace {

thread_local bool at_work = false;

void run_here(Work work, void (*body)(Work&, void*), void* context) {
  struct AtWork {
    bool before = std::exchange(at_work, true);
    ~AtWork() { at_work = before; }
  } const scope;
  body(work, context);
}

}  // namespace

void run_parallel(Index n, Index grain, void (*body)(Work&, void*), void* context) {
  if (n <= 0) return;
  const Index threads =
      n <= grain || at_work ? 1 : std::min<Index>(thread_count(), (n + grain - 1) / grain);
  if (threads == 1) {
    Share all{{0}, n};
    Work work(&all, 1, 0, n);
    return body(work, context);
  }
  const Index each = (n + threads - 1) / threads;
  // Smaller parts would even out what is left, a sixteenth of a share on average, and be more
  // calls.
  const Index least = std::max(grain, (each + 7) / 8);
  std::vector<Share> shares(threads);
  for (Index t = 0; t < threads; ++t) {
    shares[t].next = std::min(t * each, n);
    shares[t].end = std::min((t + 1) * each, n);
  }
  // One thread does all where the pool is at work already.
  torch::stable::parallel_for(0, threads, 1, [&](Index own, Index) {
    run_here({shares.data(), threads, own, least}, body, context);
  });
}

int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

namespace {

struct Buffer {
  void* data = nullptr;
  std::size_t size = 0;

  void release() {
    std::free(data);
    data = nullptr;
    size = 0;
  }
  ~Buffer() { release(); }
};

thread_local Buffer buffers[static_cast<int>(Slot::count)];

// Under the address sanitizer no buffer outlives a request: a step beyond its end, or into the
// buffer that the same slot had before, would otherwise stay inside memory that is still ours.
#ifdef __SANITIZE_ADDRESS__
constexpr bool always_new = true;
#else
constexpr bool always_new = false;
#endif

}  // namespace

void* scratch(Slot slot, std::size_t bytes) {
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (always_new || buffer.size < bytes) {
    buffer.release();
    if (posix_memalign(&buffer.data, 64, bytes)) throw std::bad_alloc();
    prepare(buffer.data, bytes);
    buffer.size = bytes;
  }
  return buffer.data;
}

void trim_scratch(Slot first) {
  for (int slot = static_cast<int>(first); slot < static_cast<int>(Slot::count); ++slot) {
    Buffer& buffer = buffers[slot];
    if (buffer.size > (std::size_t{10} << 20)) buffer.release();
    poison(buffer.data, buffer.size);
  }
}

}  // namespace hyperfast
