// The choice of ScaleRule::kMse in float32 and integers, exact, for GPUs that are slow in float64.
#pragma once

#include <math.h>

#include <cstdint>

#include "format/host_device.h"

namespace duqpp {

// The error that stepping from floor's exponent to the next one adds to a block, in two sums of
// integers: `gain` in units of 2^-25, `saving` in units of 2^-19. Same value as error_change of
// format/mx_block.h, for a block whose values are below 8 in floor's units. There, with s =
// |scaled|, the two roundings differ only for
//   s in (1/4, 3/4) or (5/4, 7/4), where the finer grid's 1/2 or 3/2 is lost: change is
//     1/4 - |s - 1/2| or 1/4 - |s - 3/2|;
//   s in [7, 8), which saturates at 6 but becomes 8: change is -4 (s - 7).
// s > 1/4 is a multiple of 2^-25 and s >= 7 one of 2^-21, so that each difference below is exact.
// The bits of a float in [1/4, 1/2] count units of 2^-25 from those of 1/4; in [7, 8), 2^-21
// from 7.
struct ErrorChange {
  uint32_t gain;    // at most 2^23 a value, 2^28 a block
  uint32_t saving;  // at most 2^21 a value, 2^26 a block
};

template <int kCount>
DUQPP_HOST_DEVICE ErrorChange error_change_sums(const float (&values)[kCount], float factor) {
  ErrorChange sums{0, 0};
  for (int i = 0; i < kCount; ++i) {
    const float s = fabsf(values[i] * factor);
    const float tent = 0.5f - fminf(fabsf(s - 0.5f), fabsf(s - 1.5f));
    sums.gain += float_bits(fmaxf(tent, 0.25f));
    sums.saving += float_bits(fmaxf(s, 7.0f));
  }
  sums.gain -= kCount * float_bits(0.25f);  // wraps around together with the sums
  sums.saving -= kCount * float_bits(7.0f);
  return sums;
}

// Whether the sum of a block's changes is negative: gain 2^-25 < saving 2^-19.
DUQPP_HOST_DEVICE constexpr bool next_exponent_is_better(uint32_t gain, uint32_t saving) {
  return (gain >> 6) < saving;
}

}  // namespace duqpp
