#include "torch/threads.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <random>
#include <vector>

#include "torch/new_memory.h"

namespace hyperfast {

using Index = std::int64_t;

struct alignas(64) Share {
  std::atomic<Index> next;
  Index end;
};

namespace {

// Under the address sanitizer no buffer outlives a request: a step beyond its end, or into the
// buffer that the same slot had before, would otherwise stay inside memory that is still ours. And
// parts of any size are taken, which otherwise depends on how fast threads are.
#ifdef __SANITIZE_ADDRESS__
constexpr bool sanitized = true;
#else
constexpr bool sanitized = false;
#endif

// A thread's own share and the next ones: to look at all takes longer the more threads there are.
constexpr Index reach = 8;

Index any_of(Index n) {
  static thread_local std::minstd_rand draw;
  return 1 + Index(draw()) % n;
}

thread_local bool at_work = false;

struct AtWork {
  AtWork() { at_work = true; }
  ~AtWork() { at_work = false; }
};

}  // namespace

bool Work::take(Index& begin, Index& end) {
  for (; done_ < std::min(count_, reach); ++done_) {
    Share& share = shares_[(own_ + done_) % count_];
    begin = share.next.load(std::memory_order_relaxed);
    while (begin < share.end) {
      const Index left = share.end - begin;
      const Index some = std::min(std::max((left + 1) / 2, least_), left);
      end = begin + (sanitized && least_ < left ? any_of(some) : some);
      if (share.next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) return true;
    }
  }
  return false;
}

void run_parallel(Index n, Index grain, void (*body)(Work&, void*), void* context) {
  if (n <= 0) return;
  const bool alone = n <= grain || at_work;
  const Index threads = alone ? 1 : std::min<Index>(thread_count(), (n + grain - 1) / grain);
  if (threads == 1 && (alone || !sanitized)) {
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
  torch::stable::parallel_for(0, threads, 1, [&](Index first, Index last) {
    const AtWork scope;
    for (Index own = first; own < last; ++own) {
      Work work(shares.data(), threads, own, least);
      body(work, context);
    }
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

}  // namespace

void* scratch(Slot slot, std::size_t bytes) {
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (sanitized || buffer.size < bytes) {
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
