// Prints what csrc/cuda/streamk_switch.h makes of the environment: on, off, or the error.

#include "cuda/streamk_switch.h"

#include <cstdio>

int main() {
  try {
    std::fputs(duqpp::cuda::streamk_switch() ? "on" : "off", stdout);
  } catch (const std::runtime_error& error) {
    std::fputs(error.what(), stdout);
  }
}
