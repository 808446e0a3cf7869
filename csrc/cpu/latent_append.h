// latent_append on the CPU: int8 slices by the selected instruction set's row quantizer, int4 ones
// in plain C++, for a few tokens are all that comes this way.
#pragma once

#include "kernels.h"

namespace int8_ops::cpu {

// Rows [begin, end) of [batch, groups, tokens], both streams.
void append_latents(const LatentAppendParams& p,
                    void (*quantize_rows)(const QuantizeParams& p, int64_t begin, int64_t end),
                    int64_t begin, int64_t end);

}  // namespace int8_ops::cpu
