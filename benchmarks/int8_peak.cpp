// The rate of int8 dot products that one core reaches: independent sums in registers, nothing else.
#include <chrono>
#include <cstdint>
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

// Operations (a multiplication and an addition count as two) a second, or 0 without AVX-512 VNNI.
extern "C" double int8_operations_per_second(double seconds) {
#if defined(__AVX512VNNI__)
  constexpr int kSums = 12;  // latency 5 times 2 pipes, and some to spare
  __m512i sums[kSums];
  for (__m512i& sum : sums) sum = _mm512_setzero_si512();
  __m512i a = _mm512_set1_epi32(0x01010101), b = a;
  const auto start = std::chrono::steady_clock::now();
  double elapsed = 0;
  int64_t instructions = 0;
  while (elapsed < seconds) {
    for (int i = 0; i < 100000; ++i) {
#pragma GCC unroll 12  // so that the sums stay in registers
      for (int j = 0; j < kSums; ++j) sums[j] = _mm512_dpbusd_epi32(sums[j], a, b);
      asm volatile("" : "+v"(a), "+v"(b));
    }
    instructions += 100000 * kSums;
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  volatile int sink = 0;
  for (const __m512i& sum : sums) sink = sink + _mm512_reduce_add_epi32(sum);
  return instructions * 128.0 / elapsed;  // 16 lanes of 4 products and 4 additions
#else
  (void)seconds;
  return 0;
#endif
}
