#if defined(__x86_64__)

#include "cpu/isa/mxfp4_gemm_ymm.h"

namespace duqpp::cpu {

const GemmKernels& avxvnni_gemm_kernels() { return kKernels; }

}  // namespace duqpp::cpu

#endif
