#include "torch/threads.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <new>

#include "torch/new_memory.h"

namespace hyperfast {

void run_parallel(std::int64_t n, std::int64_t grain,
                  void (*body)(std::int64_t, std::int64_t, void*), void* context) {
  if (n <= 0) return;
  if (n <= grain) return body(0, n, context);
  torch::stable::parallel_for(
      0, n, grain, [=](std::int64_t begin, std::int64_t end) { body(begin, end, context); });
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
