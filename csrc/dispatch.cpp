// Chooses, once per process, which build of the kernels to run.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef HF_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hyperfast {

#define HF_DECLARE(isa)       \
  namespace isa {             \
  extern const Kernels table; \
  }
// setup.py says which are built.
#ifdef HF_AMX
HF_DECLARE(amx)
#endif
#ifdef HF_AVX512_BF16
HF_DECLARE(avx512_bf16)
#endif
#ifdef HF_AVX512
HF_DECLARE(avx512)
#endif
#ifdef HF_AVX2
HF_DECLARE(avx2)
#endif
#ifdef HF_PORTABLE
HF_DECLARE(portable)
#endif
#ifdef HF_AMX_EMULATED
HF_DECLARE(amx_emulated)
#endif
#undef HF_DECLARE

namespace {

struct Candidate {
  const Kernels* table;
  bool present;
  bool (*ask)() = nullptr;  // what else must be granted

  bool runs() const { return present && (!ask || ask()); }
};

#ifdef HF_AMX
// Whether the CPU has the matrix unit with bf16, and the kernel lets this process use it: its
// registers are 8 KiB a thread, which Linux (5.16 and later) sets aside only for those that ask.
bool matrix_unit() {
  unsigned a, b, c, d;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & amx_bf16) == 0 || (d & amx_tile) == 0)
    return false;
  constexpr long request_permission = 0x1023,
                 tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

// All of this build, best first.
std::vector<Candidate> candidates() {
#ifdef HF_X86
  __builtin_cpu_init();
  [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") &&
                                     __builtin_cpu_supports("fma") &&
                                     __builtin_cpu_supports("f16c");
  [[maybe_unused]] const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  [[maybe_unused]] const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  std::vector<Candidate> all;
#ifdef HF_AMX
  all.push_back({&amx::table, avx512, matrix_unit});
#endif
#ifdef HF_AVX512_BF16
  // Of products of pairs, which are all that this build adds, an Emerald Rapids starts one every
  // second cycle, and of multiply-adds two in each: heads of bf16 take 1.5 times as long.
  const bool slow = __builtin_cpu_is("intel");
  if (!slow) all.push_back({&avx512_bf16::table, bf16});
#endif
#ifdef HF_AVX512
  all.push_back({&avx512::table, avx512});
#endif
#ifdef HF_AVX512_BF16
  if (slow) all.push_back({&avx512_bf16::table, bf16});
#endif
#ifdef HF_AVX2
  all.push_back({&avx2::table, avx2});
#endif
#ifdef HF_PORTABLE
  all.push_back({&portable::table, true});
#endif
#ifdef HF_AMX_EMULATED
  all.push_back({&amx_emulated::table, avx512});  // for tests: behind all others, it must be named
#endif
  return all;
}

const Kernels& choose() {
  const char* wanted = std::getenv("HYPERFAST_ISA");
  std::string known;
  for (const Candidate& c : candidates()) {
    const bool any = !wanted || !*wanted, this_one = !any && c.table->isa == std::string(wanted);
    if ((any || this_one) && c.runs()) return *c.table;
    if (this_one)
      throw std::invalid_argument(std::string("HYPERFAST_ISA=") + wanted +
                                  " is not available on this machine");
    known += (known.empty() ? "" : ", ") + std::string(c.table->isa);
  }
  if (!wanted || !*wanted)
    throw std::runtime_error("this machine runs none of the builds: " + known);
  throw std::invalid_argument("HYPERFAST_ISA must be one of " + known + ", got " + wanted);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::vector<const Kernels*> builds() {
  std::vector<const Kernels*> all;
  for (const Candidate& c : candidates())
    if (c.runs()) all.push_back(c.table);
  return all;
}

}  // namespace hyperfast
