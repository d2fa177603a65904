// Chooses, once per process, which build of the kernels to run.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace hyperfast {

#define HF_DECLARE(isa) \
  namespace isa {       \
  extern const Kernels table; \
  }
#ifdef HF_X86
HF_DECLARE(avx512_bf16)
HF_DECLARE(avx512)
HF_DECLARE(avx2)
#endif
HF_DECLARE(portable)
#undef HF_DECLARE

namespace {

struct Candidate {
  const Kernels* table;
  bool present;
};

const Kernels& choose() {
#ifdef HF_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  const Candidate candidates[] = {  // best first
#ifdef HF_X86
      {&avx512_bf16::table, bf16},
      {&avx512::table, avx512},
      {&avx2::table, avx2},
#endif
      {&portable::table, true},
  };

  const char* wanted = std::getenv("HYPERFAST_ISA");
  std::string known;
  for (const Candidate& c : candidates) {
    if (!wanted || !*wanted) {
      if (c.present) return *c.table;
    } else if (c.table->isa == std::string(wanted)) {
      if (c.present) return *c.table;
      throw std::invalid_argument(std::string("HYPERFAST_ISA=") + wanted +
                                  " is not available on this machine");
    }
    known += (known.empty() ? "" : ", ") + std::string(c.table->isa);
  }
  throw std::invalid_argument("HYPERFAST_ISA must be one of " + known + ", got " + wanted);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace hyperfast
