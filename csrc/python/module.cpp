// `duqpp._C`: what the compiled library says of itself, without tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa.h"
#include "python/mxfp4_gemm.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Compiled kernels of duqpp. Importing it registers torch ops in namespace duqpp_native.";

  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["cuda_architectures"] = DUQPP_CUDA_ARCHS_BUILT;
        return info;
      },
      "What the library was built with: compiler, and the CUDA architectures or an empty string.");
  m.def(
      "cpu_isas",
      [] {
        std::vector<std::string> names;
        for (const duqpp::cpu::Isa isa : duqpp::cpu::supported_isas()) {
          names.emplace_back(duqpp::cpu::isa_name(isa));
        }
        return names;
      },
      "Instruction sets that the CPU kernels can use on this machine, worst first.");
  m.def(
      "cpu_isa", [] { return duqpp::cpu::isa_name(duqpp::cpu::selected_isa()); },
      "The instruction set that they use: the best, or what DUQPP_CPU_ISA names.");

  duqpp::python::bind_kernel_table(m);
#if defined(DUQPP_WITH_CUDA)
  duqpp::python::bind_mxfp4_gemm(m);
#endif
}
