// One instantiation of mxfp4_gemm, as the functions that the dispatcher calls.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/gemm_kernel.h"
#include "problem.h"

namespace duqpp::cuda {

// `stream` is a cudaStream_t. Functions that can fail return why, or an empty string.
struct GemmInstance {
  int shared_memory;  // bytes that a CTA takes
  bool (*can_implement)(const MXFP4GemmProblem&, const GemmPlan&);
  int64_t (*workspace_size)(const MXFP4GemmProblem&, const GemmPlan&);
  std::string (*clear_workspace)(const MXFP4GemmProblem&, const GemmPlan&, void* workspace,
                                 void* stream);
  std::string (*run)(const MXFP4GemmProblem&, const GemmPlan&, void* workspace, void* stream);
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
