// Rotation and MXFP4 quantization of activations on the CPU.
#pragma once

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "problem.h"

namespace duqpp::cpu {

// Scales row-major or swizzled. A rotated value is the sum of x_k R_kn over k = 0 .. 31 in this
// order by fused multiply-adds in float32, on every instruction set.
void rotate_quantize(const RotateQuantizeProblem& problem, Isa isa,
                     const ParallelFor& parallel_for);

// The instruction set whose code runs where `isa` is chosen: AVX-VNNI brings nothing to AVX2 here.
Isa rotate_quantize_isa(Isa isa);

}  // namespace duqpp::cpu
