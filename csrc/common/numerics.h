// The constants of the numerical contract (see int8_ops/reference.py, which is that contract in
// plain PyTorch). Host and device code share them; nothing here depends on torch or CUDA.
#pragma once

#include <cstdint>

namespace int8_ops {

// The quantized range is symmetric: -128 is never produced, so that -q is always representable.
inline constexpr int kQuantMax = 127;

// A row whose scale would fall below the smallest normal float32 is stored as q = 0, scale = 1.
inline constexpr float kMinNormalScale = 1.17549435e-38F;

// int4, as int8_ops/llama/packing.py has it: the largest element m of a row becomes -8 of steps of
// m / -8.5, so a scale may be negative.
inline constexpr float kInt4Span = -8.5F;
inline constexpr float kInt4Low = -8.0F;
inline constexpr float kInt4High = 7.0F;

// |a * w| <= 128 * 128 = 2^14 for int8 operands, so K products stay within int32 as long as
// 2^14 * K <= 2^31 - 1, that is K <= 131071. Every partial sum then fits too, in any order.
inline constexpr int64_t kMaxK = 131071;

// latent_attention_decode: what one call takes of new tokens a row, and of slices a stream.
inline constexpr int64_t kMaxDecodeQueries = 16;
inline constexpr int64_t kMaxSlices = 4;

}  // namespace int8_ops
