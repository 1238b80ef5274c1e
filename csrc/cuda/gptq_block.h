// GPTQ's inner loop on a GPU.
#pragma once

#include "problem.h"

namespace duqpp::cuda {

// Enqueues one kernel on `stream` (a cudaStream_t) of the current device: no allocation, no
// synchronization. Pointers are multiples of 16 bytes. Throws std::runtime_error when CUDA refuses.
void gptq_block(const GptqBlockProblem& problem, void* stream);

}  // namespace duqpp::cuda
