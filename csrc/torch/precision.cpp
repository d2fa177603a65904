#include "torch/precision.h"

#if defined(HF_AMX) || defined(HF_AMX_EMULATED)

#include <exception>
#include <string>

// PyTorch's own C++: the stable ABI does not say how exact products of floats shall be. These
// symbols are weak, and what they mean is asked for by name: where a release of PyTorch has others,
// floats keep all their bits.
#define HF_WEAK __attribute__((weak, visibility("default")))
namespace at {
class Context;
enum class Float32Backend;
enum class Float32Op;
enum class Float32Precision;
HF_WEAK Context& globalContext();
HF_WEAK Float32Backend str2backend(const std::string&);
HF_WEAK Float32Op str2op(const std::string&);
HF_WEAK Float32Precision str2precision(const std::string&);
// A method of Context.
HF_WEAK Float32Precision float32_precision(const Context*, Float32Backend, Float32Op) __asm__(
    "_ZNK2at7Context16float32PrecisionENS_14Float32BackendENS_9Float32OpE");
}  // namespace at
#undef HF_WEAK

namespace hyperfast {
namespace {

struct Names {
  bool known = false;
  at::Float32Backend cpu;
  at::Float32Op matmul;
  at::Float32Precision high, medium;

  Names() {
    if (!at::globalContext || !at::str2backend || !at::str2op || !at::str2precision ||
        !at::float32_precision)
      return;
    try {
      cpu = at::str2backend("mkldnn");
      matmul = at::str2op("matmul");
      high = at::str2precision("tf32");
      medium = at::str2precision("bf16");
      at::float32_precision(&at::globalContext(), cpu,
                            matmul);  // throws where it knows no such pair
      known = true;
    } catch (const std::exception&) {
    }
  }
};

}  // namespace

int parts_of_float() {
  static const Names names;
  if (!names.known) return 3;
  const auto wanted = at::float32_precision(&at::globalContext(), names.cpu, names.matmul);
  return wanted == names.medium ? 1 : wanted == names.high ? 2 : 3;
}

}  // namespace hyperfast

#endif
