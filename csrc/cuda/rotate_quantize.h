// Rotation and MXFP4 quantization of activations on a GPU.
#pragma once

#include "problem.h"

namespace duqpp::cuda {

// Enqueues one kernel on `stream` (a cudaStream_t) of the current device: no allocation, no
// synchronization, so that it may be captured in a graph. x, up and norm_weight are bfloat16 or
// float16, K a multiple of 32, M K at most 2^31; x, up, norm_weight and rotation start at multiples
// of 16 bytes, codes at a multiple of 4. Every byte of codes and scales is written.
//
// The kernel waits for the one before it on the stream, and lets the next one start early
// (programmatic dependent launch): a next kernel that was launched with that attribute must itself
// wait before it reads codes or scales. It reads rotation and norm_weight before that wait: they
// are a model's constants, and must not be what the kernel just before this one writes.
//
// Throws std::runtime_error when CUDA refuses.
void rotate_quantize(const RotateQuantizeProblem& problem, void* stream);

}  // namespace duqpp::cuda
