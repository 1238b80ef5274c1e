// The warp policy of mxfp4_gemm_sm80.cuh on a GPU: one lane of a warp.
#pragma once

#include <cstdint>

#include "cuda/gpu_lanes.cuh"
#include "cuda/mxfp4_gemm_sm80.cuh"

namespace duqpp::cuda {

// Loads and copies are volatile: they keep their order, and those of x cannot move above the wait
// for the kernel before this one.
struct GpuGemmWarp : GpuLanes {
  // Copies to shared memory, where `valid`, that take their time: 128 bits, which no other warp
  // will ask for and which leave L1 to x, or 32. They end in groups, those of a lane in order. A
  // load from the same place that comes before a copy reads what was there: both pass through one
  // queue, in order. Source: PTX ISA, cp.async.
  static __device__ __forceinline__ void copy(Words& to, const void* from, bool valid) {
    asm volatile(
        "{.reg .pred valid;\n"
        "setp.ne.b32 valid, %2, 0;\n"
        "@valid cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(shared_address(&to)),
        "l"(from), "r"(static_cast<int>(valid))
        : "memory");
  }

  static __device__ __forceinline__ void copy(uint32_t& to, const void* from, bool valid) {
    asm volatile(
        "{.reg .pred valid;\n"
        "setp.ne.b32 valid, %2, 0;\n"
        "@valid cp.async.ca.shared.global [%0], [%1], 4;}" ::"r"(shared_address(&to)),
        "l"(from), "r"(static_cast<int>(valid))
        : "memory");
  }

  // The copies since the last such call are a group, none of them too.
  static __device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  // Until all groups but the newest kGroups have ended: what they brought is there for the lane
  // that copied it.
  template <int kGroups>
  static __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
  }

  // 32 bits where `valid`; otherwise `word` keeps its value.
  static __device__ __forceinline__ void load_word(uint32_t& word, const void* address,
                                                   bool valid) {
    asm volatile(
        "{.reg .pred valid;\n"
        "setp.ne.b32 valid, %2, 0;\n"
        "@valid ld.global.u32 %0, [%1];}"
        : "+r"(word)
        : "l"(address), "r"(static_cast<int>(valid)));
  }

  static __device__ __forceinline__ uint32_t load_byte(const uint8_t* address) {
    return __ldg(address);
  }

  // The value, in a register from here on: compilers see a constant through every other way to say
  // so, and then move it to a register again for each PRMT.
  static __device__ __forceinline__ uint32_t in_register(uint32_t value) {
    uint32_t kept;
    asm volatile(
        "{.reg .u32 zero;\n"
        "mov.u32 zero, %%laneid;\n"
        "shr.u32 zero, zero, 5;\n"
        "add.u32 %0, zero, %1;}"
        : "=r"(kept)
        : "r"(value));
    return kept;
  }

  static __device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high,
                                                     uint32_t selectors) {
    uint32_t bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selectors));
    return bytes;
  }

  // d = c + a b. Source: PTX ISA, mma.m16n8k32 with 8-bit integers.
  static __device__ __forceinline__ void mma(const Lanes<MmaA8>& a, const Lanes<MmaB8>& b,
                                             const Lanes<MmaC32>& c, Lanes<MmaC32>& d) {
    const auto& [a0, a1, a2, a3] = a.value.word;
    const auto& [b0, b1] = b.value.word;
    int32_t d0, d1, d2, d3;
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=r"(d0), "=r"(d1), "=r"(d2), "=r"(d3)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c.value.value[0]),
          "r"(c.value.value[1]), "r"(c.value.value[2]), "r"(c.value.value[3]));
    d.value = {{d0, d1, d2, d3}};
  }

  static __device__ __forceinline__ bool any(const Lanes<bool>& condition) {
    return __any_sync(~0u, condition.value) != 0;
  }

  // What a lane wrote to shared memory is there for the others; all lanes are at one place.
  static __device__ __forceinline__ void sync() { __syncwarp(); }

 private:
  static __device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
  }
};

}  // namespace duqpp::cuda
