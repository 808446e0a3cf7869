// The avx2 kernels: the shared drivers on that instruction set's vector ops. Compiled with flags of
// its own: see Note [One unit an instruction set] in isa.h.
#include "simd_avx2.h"
#include "simd_table.h"

namespace int8_ops::cpu {

constinit const KernelTable kAvx2Kernels = simd_table<Avx2>("avx2");

}  // namespace int8_ops::cpu
