// MXFP4 matrices in a wider format: the kernels of cuda/expand.h in plain C++, in the layouts of
// the GPU, so that what is built on them runs without one.
#pragma once

#include "cpu/parallel.h"
#include "problem.h"

namespace duqpp::cpu {

void expand_activation(const ExpandProblem& problem, const ParallelFor& parallel_for);
void expand_weight(const ExpandProblem& problem, const ParallelFor& parallel_for);

}  // namespace duqpp::cpu
