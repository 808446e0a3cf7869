// Which instruction sets the CPU kernels can use here. No kernel is named in this file, so the
// build-info module links it as well.
//
// Note [One unit an instruction set]
// avx2.cpp and avx512_vnni.cpp are compiled with flags of their own (setup.py, CPU_ISA_FLAGS);
// every other unit runs on any machine of the architecture. The linker keeps one copy of an inline
// function or template that several units emit, and it may be the one compiled for AVX-512. So
// these units share no such code with others: their templates stand in anonymous namespaces, and
// they call no inline function of a shared header at run time, unless it is always_inline.
#pragma once

#include <string>
#include <vector>

namespace int8_ops::cpu {

// Instruction sets with kernels that this machine and its operating system can run, worst first;
// "portable" is always there.
std::vector<std::string> supported_isas();

// The one in use: INT8_OPS_CPU_ISA if set, else the best. Throws std::runtime_error if the variable
// names one that is unknown or that this machine lacks.
std::string selected_isa();

}  // namespace int8_ops::cpu
