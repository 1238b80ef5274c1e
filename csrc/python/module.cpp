// `duqpp._C`: what the compiled library says of itself, without tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/mxfp4_gemm.h"
#include "cpu/rotate_quantize.h"
#include "python/mxfp4_gemm.h"

namespace py = pybind11;
using namespace py::literals;

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
  m.def(
      "cpu_isa_features",
      [] {
        std::vector<std::pair<std::string, std::string>> features;
        for (const duqpp::cpu::Isa isa : duqpp::cpu::all_isas()) {
          features.emplace_back(duqpp::cpu::isa_name(isa), duqpp::cpu::isa_features(isa));
        }
        return features;
      },
      "Every instruction set that there are CPU kernels for, worst first, and what it needs.");
  m.def(
      "cpu_rotate_quantize_isa",
      [] {
        return duqpp::cpu::isa_name(duqpp::cpu::rotate_quantize_isa(duqpp::cpu::selected_isa()));
      },
      "The instruction set of the code of rotate_quantize that runs.");
  m.def(
      "cpu_gemm_in_place",
      [](int64_t M) { return duqpp::cpu::multiplies_in_place(duqpp::cpu::selected_isa(), M); },
      "M"_a, "Whether mxfp4_gemm of M rows reads its weights as they lie in memory.");

  duqpp::python::bind_kernel_table(m);
#if defined(DUQPP_WITH_CUDA)
  duqpp::python::bind_mxfp4_gemm(m);
#endif
}
