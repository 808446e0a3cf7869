// latent_append on CUDA, sm_80 and up.
#pragma once

#include "../../common/params.h"

namespace int8_ops::cuda::attention {

// One launch for both streams and all slices. A slot that the buffers don't have stops the kernel
// by an assertion, as an index beyond a tensor stops torch's: it lies on the device, and reading it
// here would wait for everything before.
void append_latents(const LatentAppendParams& p);

}  // namespace int8_ops::cuda::attention
