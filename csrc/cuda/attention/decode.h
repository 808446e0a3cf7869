// latent_attention_decode on CUDA: which path attends, and what lies where in the workspace.
#pragma once

#include <cstdint>

#include "../../common/params.h"

namespace int8_ops::cuda {

// Bytes of device memory that latent_attention() wants in p.workspace.
int64_t latent_attention_workspace_bytes(const LatentAttentionParams& p);

// Runs the op on the context's device and stream. Throws where INT8_OPS_ATTENTION_PATH names a path
// that can't serve p.
void latent_attention(const LatentAttentionParams& p);

}  // namespace int8_ops::cuda
