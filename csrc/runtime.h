// What kernels need from the outside: threads and scratch memory. Declared here as plain functions so
// that the files built for one instruction set instantiate no shared template (runtime.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace hyperfast {

// Calls body(begin, end, context) over [0, n) from torch's own thread pool, at least `grain` items a
// call; n <= grain runs on the calling thread. What the body throws arrives as std::runtime_error.
void run_parallel(std::int64_t n, std::int64_t grain,
                  void (*body)(std::int64_t, std::int64_t, void*), void* context);

int thread_count();

// 64-byte aligned memory of this thread, at least `bytes` long, kept for the next call and freed with
// the thread. Each slot is one buffer: asking again for the same slot may move it and loses its content.
enum class Slot { a, b, c, d, e, f, count };
void* scratch(Slot slot, std::size_t bytes);

}  // namespace hyperfast
