#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace duqpp::cpu {
namespace {

#if defined(__x86_64__)

struct CpuidWords {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;  // zeros for a leaf that the processor lacks
};

CpuidWords cpuid(uint32_t leaf, uint32_t subleaf) {
  CpuidWords words;
  __get_cpuid_count(leaf, subleaf, &words.eax, &words.ebx, &words.ecx, &words.edx);
  return words;
}

// XCR0: the register states that the operating system saves. Only where leaf 1 says OSXSAVE.
uint64_t saved_states() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

constexpr bool has_bits(uint64_t word, uint64_t bits) { return (word & bits) == bits; }

bool supports(Isa isa) {
  if (isa == Isa::kPortable) return true;
  // Bits of leaf 1 and leaf 7. Source: Intel SDM, volume 2A, CPUID; volume 1, section 13.3 (XCR0).
  constexpr uint32_t kFma = 1u << 12, kOsXsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
  constexpr uint32_t kAvx2 = 1u << 5, kAvxVnni = 1u << 4, kAvx512Vnni = 1u << 11;
  constexpr uint32_t kAvx512F = 1u << 16, kAvx512Dq = 1u << 17;
  constexpr uint32_t kAvx512Bw = 1u << 30, kAvx512Vl = 1u << 31;
  constexpr uint64_t kYmmState = 0x6, kZmmState = 0xE6;  // SSE, AVX; and opmask, ZMM low and high

  const CpuidWords basic = cpuid(1, 0), extended = cpuid(7, 0), extended1 = cpuid(7, 1);
  if (!has_bits(basic.ecx, kFma | kOsXsave | kAvx | kF16c)) return false;
  const uint64_t states = saved_states();
  if (!has_bits(states, kYmmState) || !has_bits(extended.ebx, kAvx2)) return false;
  if (isa == Isa::kAvx2) return true;
  if (isa == Isa::kAvxVnni) return has_bits(extended1.eax, kAvxVnni);
  return has_bits(states, kZmmState) &&
         has_bits(extended.ebx, kAvx512F | kAvx512Dq | kAvx512Bw | kAvx512Vl) &&
         has_bits(extended.ecx, kAvx512Vnni);
}

#else

bool supports(Isa isa) { return isa == Isa::kPortable; }

#endif

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvxVnni:
      return "avx-vnni";
    case Isa::kAvx512:
      return "avx512";
  }
  return "unknown";
}

const char* isa_features(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "nothing";
    case Isa::kAvx2:
      return "AVX2, FMA and F16C";
    case Isa::kAvxVnni:
      return "AVX2, FMA, F16C and AVX-VNNI";
    case Isa::kAvx512:
      return "AVX-512 F, BW, DQ, VL and VNNI";
  }
  return "unknown";
}

std::vector<Isa> all_isas() { return {Isa::kPortable, Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512}; }

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
  for (const Isa isa : all_isas()) {
    if (supports(isa)) isas.push_back(isa);
  }
  return isas;
}

Isa choose_isa(const std::string& name) {
  const std::vector<Isa> isas = supported_isas();
  if (name.empty()) return isas.back();
  std::string available;
  for (const Isa isa : isas) {
    if (name == isa_name(isa)) return isa;
    available += (available.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::runtime_error("DUQPP_CPU_ISA must name an instruction set of this machine (" +
                           available + "), got " + name);
}

Isa selected_isa() {
  // Once: in a virtual machine each CPUID instruction costs tens of microseconds.
  static const Isa selected = [] {
    const char* const name = std::getenv("DUQPP_CPU_ISA");
    return choose_isa(name == nullptr ? "" : name);
  }();
  return selected;
}

}  // namespace duqpp::cpu
