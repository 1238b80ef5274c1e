// The instruction sets that the CPU kernels are written for, and which of them this machine has.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace duqpp::cpu {

// Worst first. Every kernel computes the same bytes on each.
enum class Isa : int32_t {
  kPortable = 0,  // no intrinsics
  kAvx2 = 1,      // AVX2, FMA, F16C
  kAvxVnni = 2,   // and AVX-VNNI
  kAvx512 = 3,    // AVX-512 F, BW, DQ, VL and VNNI
};

const char* isa_name(Isa isa);  // "portable", "avx2", "avx-vnni", "avx512"

const char* isa_features(Isa isa);  // what it needs of a CPU: "AVX2, FMA and F16C"

std::vector<Isa> all_isas();  // worst first

// Those that this machine runs (the operating system saves their registers too), worst first.
std::vector<Isa> supported_isas();

// The one of that name; of an empty name, the best of them.
// Throws std::runtime_error for a name that is unknown or that this machine cannot run.
Isa choose_isa(const std::string& name);

// choose_isa of the environment variable DUQPP_CPU_ISA as it is when this is first called.
Isa selected_isa();

}  // namespace duqpp::cpu
