// One instantiation of mxfp4_gemm, as the functions that the dispatcher calls.
#pragma once

#include <cstdint>

#include "cuda/gemm_kernel.h"
#include "problem.h"

namespace duqpp::cuda {

// `stream` is a cudaStream_t. What CUDA or CUTLASS refuses is a std::runtime_error.
struct GemmInstance {
  int shared_memory;  // bytes that a CTA takes
  bool (*can_implement)(const MXFP4GemmProblem&, const GemmPlan&);
  int64_t (*workspace_size)(const MXFP4GemmProblem&, const GemmPlan&);
  void (*clear_workspace)(const MXFP4GemmProblem&, const GemmPlan&, void* workspace, void* stream);
  void (*run)(const MXFP4GemmProblem&, const GemmPlan&, void* workspace, void* stream);
};

// Each in a source of its own, but for those of sm_80, which share one.
extern const GemmInstance kSm100Swapped;
extern const GemmInstance kSm100SwappedStreamK;
extern const GemmInstance kSm100Tile256x128;
extern const GemmInstance kSm100Tile256x192;
extern const GemmInstance kSm100Tile256x256;
extern const GemmInstance kSm120Tile128x128;
extern const GemmInstance kSm80Tile16x8;
extern const GemmInstance kSm80Tile32x8;
extern const GemmInstance kSm80Tile64x8;
extern const GemmInstance kSm80Tile16x16;
extern const GemmInstance kSm80Tile32x16;
extern const GemmInstance kSm80Tile64x16;
extern const GemmInstance kSm80Tile32x32;

}  // namespace duqpp::cuda
