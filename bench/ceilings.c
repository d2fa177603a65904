// What this machine's cores can do at most: multiply-adds from registers, and reads from memory.
// Compiled when the benchmark runs, for this machine alone.
#include <stddef.h>

#if defined(__AVX512F__)
#define WIDTH 16
#define CHAINS 24
#elif defined(__AVX__)
#define WIDTH 8
#define CHAINS 12
#else
#define WIDTH 4
#define CHAINS 12
#endif
typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4)));

// Independent chains, more than latency times issue width (4 x 2), fewer than there are registers.
float multiply_add(size_t rounds, float factor) {
  vec sums[CHAINS], factors = factor - (vec){0};
  for (int c = 0; c < CHAINS; c++) sums[c] = (float)c - (vec){0};
  for (size_t r = 0; r < rounds; r++)
#pragma GCC unroll 24
    for (int c = 0; c < CHAINS; c++) sums[c] = sums[c] * factors + factors;
  vec total = sums[0];
  for (int c = 1; c < CHAINS; c++) total += sums[c];
  return total[0];
}

size_t flops_per_round(void) { return 2 * WIDTH * CHAINS; }

float read_all(const float* data, size_t count) {
  vec sums[8] = {{0}};
  for (size_t i = 0; i + 8 * WIDTH <= count; i += 8 * WIDTH)
#pragma GCC unroll 8
    for (int c = 0; c < 8; c++) sums[c] += *(const vec*)(data + i + c * WIDTH);
  for (int c = 1; c < 8; c++) sums[0] += sums[c];
  return sums[0][0];
}
