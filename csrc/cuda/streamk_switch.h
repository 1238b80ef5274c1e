// Whether stream-K may be chosen (kernel_table.h). Host code without CUDA.
#pragma once

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace duqpp::cuda {

// Of the process: what DUQPP_STREAMK says when it is first asked, `on` where it is not set, until
// `duqpp selfcheck` sets it, which runs stream-K apart from the other kernels.
// Throws std::runtime_error for another value of the variable.
inline std::atomic<bool>& streamk_switch() {
  static std::atomic<bool> allowed = [] {
    const char* const variable = std::getenv("DUQPP_STREAMK");
    const std::string value = variable == nullptr ? "on" : variable;
    if (value == "on" || value == "off") return value == "on";
    throw std::runtime_error("DUQPP_STREAMK must be on or off, got " + value);
  }();
  return allowed;
}

}  // namespace duqpp::cuda
