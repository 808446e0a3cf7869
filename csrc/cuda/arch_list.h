// Whether what was compiled runs on a device. Host code, no CUDA: tested through int8_ops._build.
#pragma once

#include <string>

namespace int8_ops::cuda {

// `archs` as TORCH_CUDA_ARCH_LIST writes it ("8.0+PTX;9.0a"). Empty if a device of capability
// major.minor can run it: machine code of the same major and no higher minor (exactly the same for
// an "a" architecture), or PTX of no higher capability. Else the sentence that says why not.
std::string why_not_runnable(const std::string& archs, int major, int minor);

// Whether `archs` holds the code of sm_90a, which alone has wgmma.
bool holds_sm90a(const std::string& archs);

}  // namespace int8_ops::cuda
