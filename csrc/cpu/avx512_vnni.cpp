// The avx512_vnni kernels: the shared drivers on that instruction set's vector ops. Compiled with
// flags of its own: see Note [One unit an instruction set] in isa.h.
#include "simd_avx512_vnni.h"
#include "simd_table.h"

namespace int8_ops::cpu {

constinit const KernelTable kAvx512VnniKernels = simd_table<Avx512Vnni>("avx512_vnni");

}  // namespace int8_ops::cpu
