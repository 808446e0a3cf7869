// The path of latent_attention_decode that serves everything the op takes, on sm_80 and up.
#pragma once

#include "../heuristics/gemm_heuristics.h"
#include "partials.h"

namespace int8_ops::cuda::attention {

// First half of the op: scores and weighted sums of latents, a split at a time.
void general_attend(const LatentAttentionParams& p, const Partials& partials,
                    const DeviceFacts& device);

}  // namespace int8_ops::cuda::attention
