// The kernel table of the selected instruction set.
#pragma once

#include "kernels.h"

namespace int8_ops::cpu {

// Chosen at the first call and kept. Throws as selected_isa() does.
const KernelTable& kernels();

}  // namespace int8_ops::cpu
