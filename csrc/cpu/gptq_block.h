// GPTQ's inner loop on the CPU.
#pragma once

#include "cpu/parallel.h"
#include "problem.h"

namespace duqpp::cpu {

// The same bytes with any number of threads. One code for every CPU: what it takes is a few
// hundredths of what the products between its calls take.
void gptq_block(const GptqBlockProblem& problem, const ParallelFor& parallel_for);

}  // namespace duqpp::cpu
