#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace int8_ops::cpu {

std::vector<std::string> supported_isas() {
  std::vector<std::string> isas = {"portable"};
#if defined(__x86_64__)
  // These ask cpuid, and xgetbv whether the operating system saves the registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("fma")) {
    isas.emplace_back("avx2");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")) {
      isas.emplace_back("avx512_vnni");
    }
  }
#endif
  return isas;
}

std::string selected_isa() {
  const std::vector<std::string> supported = supported_isas();
  const char* forced = std::getenv("INT8_OPS_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return supported.back();
  if (std::find(supported.begin(), supported.end(), forced) != supported.end()) return forced;
  std::string message = "int8_ops: INT8_OPS_CPU_ISA=" + std::string(forced) +
                        " is not available on this machine; it has:";
  for (const std::string& isa : supported) message += " " + isa;
  throw std::runtime_error(message);
}

}  // namespace int8_ops::cpu
