#include <immintrin.h>

#include "cpu/rotate_quantize_strip.h"

namespace duqpp::cpu {
namespace {

struct Avx2Lanes {
  using Vector = __m256;
  static constexpr int kCount = 8;
  // 4 x 2 sums keep both multiply-add pipes busy (latency 4) within 16 registers.
  static constexpr int kTileRows = 4, kTileVectors = 2;
  static inline Vector zero() { return _mm256_setzero_ps(); }
  static inline Vector load(const float* p) { return _mm256_load_ps(p); }
  static inline Vector broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static inline Vector multiply_add(Vector a, Vector b, Vector c) {
    return _mm256_fmadd_ps(a, b, c);
  }
  static inline void store(float* p, Vector v) { _mm256_store_ps(p, v); }
};

}  // namespace

const StripKernels kAvx2Strip = StripLoop<Avx2Lanes>::kernels();

}  // namespace duqpp::cpu
