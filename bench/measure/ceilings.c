// What this machine's cores can do at most: multiply-adds from registers, products on a matrix
// unit, and reads from memory. Compiled when the benchmark runs, for this machine alone.
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

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

// Products of matrices of float on the matrix unit: six of bf16 each, of numbers that use all bits,
// as the clock depends on them. 0 where the kernel does not lend the unit.
size_t flops_per_tiles(void) {
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? 2 * 16 * 16 * 32 * 4 : 0;
}

void multiply_tiles(size_t rounds) {
  struct __attribute__((packed)) {
    unsigned char palette, start, reserved[14];
    unsigned short bytes[16];
    unsigned char rows[16];
  } shapes = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  unsigned short data[4][512];
  unsigned seed = 1;
  for (int i = 0; i < 2048; i++) {
    seed = seed * 1664525u + 1013904223u;
    data[i / 512][i % 512] = 0x3f00 | (seed >> 16 & 0x80ff);
  }
  _tile_loadconfig(&shapes);
  __asm__ volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, data[0], 64);
  _tile_loadd(5, data[1], 64);
  _tile_loadd(6, data[2], 64);
  _tile_loadd(7, data[3], 64);
  for (size_t r = 0; r < rounds; r++)
    for (int part = 0; part < 6; part++) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  _tile_release();
}
#else
size_t flops_per_tiles(void) { return 0; }
void multiply_tiles(size_t rounds) { (void)rounds; }
#endif

float read_all(const float* data, size_t count) {
  vec sums[8] = {{0}};
  for (size_t i = 0; i + 8 * WIDTH <= count; i += 8 * WIDTH)
#pragma GCC unroll 8
    for (int c = 0; c < 8; c++) sums[c] += *(const vec*)(data + i + c * WIDTH);
  for (int c = 1; c < 8; c++) sums[0] += sums[c];
  return sums[0][0];
}
