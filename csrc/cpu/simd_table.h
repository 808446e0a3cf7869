// The kernel table of an instruction set, from its vector ops. See simd_matmul.h for the rules of
// such a header.
#pragma once

#include "simd_combine_attention.h"
#include "simd_latent_attention.h"
#include "simd_matmul.h"

namespace int8_ops::cpu {
namespace {

template <typename V>
constexpr KernelTable simd_table(const char* isa) {
  const TileShape tile = {V::kTileRows, V::kTileCols, V::kGroup, V::kChunk, V::kDotMaxRows};
  return {isa,          quantize_rows<V>, quantize_cols<V>,    dequantize<V>,
          tile,         matmul_dot<V>,    pack_row_blocks<V>,  matmul_task<V>,
          pack_keys<V>, attend_split<V>,  combine_attention<V>};
}

}  // namespace
}  // namespace int8_ops::cpu
