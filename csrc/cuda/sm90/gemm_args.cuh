// What the Hopper kernels are launched with.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../epilogue/scale_epilogue.cuh"

namespace int8_ops::cuda::sm90 {

// A kernel parameter (__grid_constant__): the copy engine reads the maps where they lie.
struct GemmArgs {
  CUtensorMap w_map;
  CUtensorMap a_map;    // where a is given
  CUtensorMap out_map;  // where the output has 16 bits
  const void* x;        // where it is not
  // Where x is quantized beside the products: what a_map maps, a scale a row, the rounds of rows
  // that were drawn, and for every 128 rows how many are done. Stationary: where the shares of a
  // tile of rows pass through L2.
  int8_t* q;
  float* row_scales;
  uint32_t* drawn;
  uint32_t* done;
  int32_t m;
  int32_t n;
  int32_t k;
  int32_t k_blocks;  // of 128
  int32_t m_tiles;   // of a cluster's rows
  int32_t n_tiles;   // stationary: units of columns of a block
  int32_t n_parts;   // blocks that share a row tile, each with a part of its columns; stationary:
                     // clusters
  int32_t stages;    // stationary: buffers for a tile of rows
  int32_t factor_slots;
  ScaleEpilogue epilogue;
};

// Where the rows of a come from.
enum class Source { kInt8, kFloat16, kBFloat16, kFloat32 };

}  // namespace int8_ops::cuda::sm90
