#pragma once

#include <sstream>
#include <stdexcept>

#include "kernels.h"

namespace hyperfast {

// Python sees std::invalid_argument as ValueError.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// Whoever passes expanded or empty tensors can name any size. Kernels count elements in 64 bits,
// which holds while no product of sizes comes near 2^63 bytes.
inline void countable(double elements) {
  if (elements > 0x1p58) fail("sizes must not multiply to more than 2^58 elements");
}

}  // namespace hyperfast
