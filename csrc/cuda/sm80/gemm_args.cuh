// What the mma.sync GEMM kernel is launched with.
#pragma once

#include <cstdint>

#include "../epilogue/scale_epilogue.cuh"

namespace int8_ops::cuda::sm80 {

struct GemmArgs {
  const int8_t* a;
  const int8_t* w;
  int32_t m;
  int32_t n;
  int32_t k;
  int32_t m_tiles;
  int32_t n_tiles;
  int32_t splits;
  int32_t k_blocks_per_split;
  ScaleEpilogue epilogue;
};

}  // namespace int8_ops::cuda::sm80
