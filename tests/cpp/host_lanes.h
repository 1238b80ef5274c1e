// What every warp policy on a CPU has in common: 32 lanes as an array, each with a turn of a loop.
#pragma once

#include "format/fragment.h"

struct HostLanes {
  template <class T>
  struct Lanes {
    T value[duqpp::kWarpLanes];
    T& operator[](int lane) { return value[lane]; }
    const T& operator[](int lane) const { return value[lane]; }
  };

  template <class Body>
  static void for_each_lane(Body&& body) {
    for (int lane = 0; lane < duqpp::kWarpLanes; ++lane) body(lane);
  }
};
