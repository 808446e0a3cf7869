// Which instruction sets the CPU kernels can use here. No kernel is named in this file, so the
// build-info module links it as well.
#pragma once

#include <string>
#include <vector>

namespace int8_ops::cpu {

// Instruction sets with kernels that this machine can run, worst first; "portable" is always there.
std::vector<std::string> supported_isas();

// The one in use: INT8_OPS_CPU_ISA if set, else the best. Throws std::runtime_error if the variable
// names one that is unknown or that this machine lacks.
std::string selected_isa();

}  // namespace int8_ops::cpu
