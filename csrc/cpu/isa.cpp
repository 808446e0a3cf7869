#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace int8_ops::cpu {

std::vector<std::string> supported_isas() { return {"portable"}; }

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
