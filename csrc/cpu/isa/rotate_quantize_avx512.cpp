#include <immintrin.h>

#include "cpu/rotate_quantize_strip.h"

namespace duqpp::cpu {
namespace {

struct Avx512Lanes {
  using Vector = __m512;
  static constexpr int kCount = 16;
  // 4 x 2 sums keep both multiply-add pipes busy (latency 4).
  static constexpr int kTileRows = 4, kTileVectors = 2;
  static inline Vector zero() { return _mm512_setzero_ps(); }
  static inline Vector load(const float* p) { return _mm512_load_ps(p); }
  static inline Vector broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static inline Vector multiply_add(Vector a, Vector b, Vector c) {
    return _mm512_fmadd_ps(a, b, c);
  }
  static inline void store(float* p, Vector v) { _mm512_store_ps(p, v); }
};

}  // namespace

const StripKernels kAvx512Strip = StripLoop<Avx512Lanes>::kernels();

}  // namespace duqpp::cpu
