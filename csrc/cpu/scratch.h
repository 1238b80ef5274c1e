// Working memory of a kernel that survives the call, so that its pages are touched once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace duqpp::cpu {

// A buffer that grows and starts at a cache line. Its contents are whatever the last user left.
class Scratch {
 public:
  uint8_t* reserve(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      const auto rounded = static_cast<std::size_t>((bytes + kAlignment - 1) / kAlignment);
      memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(kAlignment, rounded * kAlignment)));
      size_ = memory_ ? bytes : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return memory_.get();
  }

 private:
  static constexpr int64_t kAlignment = 64;
  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace duqpp::cpu
