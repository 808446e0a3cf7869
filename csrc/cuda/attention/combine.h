// The second half of latent_attention_decode on CUDA, for every path of the first half.
#pragma once

#include "../heuristics/gemm_heuristics.h"
#include "partials.h"

namespace int8_ops::cuda::attention {

// Bytes of device memory that combine() wants beside the partial results.
int64_t folded_bytes(const LatentAttentionParams& p, const Partials& partials);

// Folds the splits of every query and applies the values' A: partial results -> p.out.
void combine(const LatentAttentionParams& p, const Partials& partials, float* folded,
             const DeviceFacts& device);

}  // namespace int8_ops::cuda::attention
