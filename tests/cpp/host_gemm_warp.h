// The warp policy of csrc/cuda/mxfp4_gemm_sm80.cuh on a CPU: 32 lanes as an array, and its two
// special instructions written from their definitions. A copy to shared memory arrives when its
// group is waited for and not before: until then its place holds codes that no result may come
// from.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#include "cuda/mxfp4_gemm_sm80.cuh"
#include "host_lanes.h"

struct HostGemmWarp : HostLanes {
  static inline int misaligned_loads = 0;

  // A warp's copies, in groups; the newest takes more until it is committed.
  struct Copy {
    void* to;
    std::vector<uint8_t> bytes;
  };
  using Group = std::vector<Copy>;
  struct Copies {
    Group open;
    std::deque<Group> committed;
  };
  static inline Copies* copies = nullptr;  // of the warp that runs

  template <class T>
  static void copy(T& to, const void* from, bool valid) {
    if (!valid) return;
    misaligned_loads += reinterpret_cast<uintptr_t>(from) % sizeof to != 0;
    misaligned_loads += reinterpret_cast<uintptr_t>(&to) % sizeof to != 0;
    const auto* const bytes = static_cast<const uint8_t*>(from);
    copies->open.push_back({&to, {bytes, bytes + sizeof to}});
    std::memset(&to, 0x5A, sizeof to);
  }

  static void commit_copies() {
    copies->committed.push_back(std::move(copies->open));
    copies->open.clear();
  }

  template <int kGroups>
  static void wait_for_copies() {
    while (copies->committed.size() > kGroups) {
      for (const Copy& copy : copies->committed.front()) {
        std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
      }
      copies->committed.pop_front();
    }
  }

  static void load_word(uint32_t& word, const void* address, bool valid) {
    if (!valid) return;
    misaligned_loads += reinterpret_cast<uintptr_t>(address) % sizeof word != 0;
    std::memcpy(&word, address, sizeof word);
  }

  static uint32_t load_byte(const uint8_t* address) { return *address; }

  static uint32_t in_register(uint32_t value) { return value; }

  // prmt.b32: a nibble of the selector is the number of a byte of {high, low}, and bit 3 replaces
  // the byte by copies of its sign bit. Source: PTX ISA, prmt, default mode.
  static uint32_t permute(uint32_t low, uint32_t high, uint32_t selectors) {
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t selector = (selectors >> (4 * i)) & 15;
      const uint32_t source = selector & 4 ? high : low;
      uint32_t byte = (source >> (8 * (selector & 3))) & 255;
      if (selector & 8) byte = byte & 128 ? 255 : 0;
      result |= byte << (8 * i);
    }
    return result;
  }

  // mma.m16n8k32, row.col.s32.s8.s8.s32. Where lane's i-th element lies, from the PTX ISA, "Matrix
  // Fragments for mma.m16n8k32" with .s8: group = lane >> 2, thread = lane % 4.
  static void mma(const Lanes<duqpp::cuda::MmaA8>& a, const Lanes<duqpp::cuda::MmaB8>& b,
                  const Lanes<duqpp::cuda::MmaC32>& c, Lanes<duqpp::cuda::MmaC32>& d) {
    int A[16][32], B[8][32], C[16][8];  // B by columns
    const auto element = [](const uint32_t* words, int i) {
      return static_cast<int>(static_cast<int8_t>(words[i / 4] >> (8 * (i % 4))));
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane >> 2, thread = lane % 4;
      for (int i = 0; i < 16; ++i) {
        const bool first_row = i < 4 || (i >= 8 && i < 12);
        A[first_row ? group : group + 8][thread * 4 + (i & 3) + (i >= 8 ? 16 : 0)] =
            element(a[lane].word, i);
      }
      for (int i = 0; i < 8; ++i) {
        B[group][thread * 4 + (i & 3) + (i >= 4 ? 16 : 0)] = element(b[lane].word, i);
      }
      for (int i = 0; i < 4; ++i) {
        C[i < 2 ? group : group + 8][thread * 2 + (i & 1)] = c[lane].value[i];
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        for (int k = 0; k < 32; ++k) C[row][column] += A[row][k] * B[column][k];
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane >> 2, thread = lane % 4;
      for (int i = 0; i < 4; ++i) {
        d[lane].value[i] = C[i < 2 ? group : group + 8][thread * 2 + (i & 1)];
      }
    }
  }

  static bool any(const Lanes<bool>& condition) {
    bool result = false;
    for (const bool value : condition.value) result |= value;
    return result;
  }

  static void sync() {}
};
