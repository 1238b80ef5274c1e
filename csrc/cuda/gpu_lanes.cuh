// What every warp policy on a GPU has in common: a thread is one lane of its warp and keeps that
// lane's state alone.
#pragma once

#include "format/fragment.h"

namespace duqpp::cuda {

struct GpuLanes {
  template <class T>
  struct Lanes {
    T value;
    __device__ T& operator[](int) { return value; }
    __device__ const T& operator[](int) const { return value; }
  };

  template <class Body>
  static __device__ __forceinline__ void for_each_lane(Body&& body) {
    body(static_cast<int>(threadIdx.x) % kWarpLanes);
  }
};

}  // namespace duqpp::cuda
