// Angles of RoPE, as Note [RoPE inside a tile] in cpu/latent_attention_plan.h has them.
#pragma once

#include <cstdint>

namespace int8_ops::cuda::attention {

// Cosine and sine of position * inv_freq, each within 1e-6: the angle is reduced in float64, in
// float32 a position of 100,000 would leave two digits of it.
__device__ __forceinline__ float2 rotation(int32_t position, float inv_freq) {
  constexpr double kTwoPi = 6.283185307179586;
  const double angle = static_cast<double>(position) * static_cast<double>(inv_freq);
  const auto reduced = static_cast<float>(fma(-rint(angle * (1.0 / kTwoPi)), kTwoPi, angle));
  float2 turn;
  __sincosf(reduced, &turn.y, &turn.x);
  return turn;
}

}  // namespace int8_ops::cuda::attention
