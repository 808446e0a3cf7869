// Angles of RoPE, as Note [RoPE inside a tile] in cpu/latent_attention_plan.h has them.
#pragma once

#include <cstdint>

namespace int8_ops::cuda::attention {

// Cosine and sine of position * inv_freq, each within 1e-6. A position of 100,000 would leave two
// digits of the angle in float32: what the product's rounding took off is kept, and whole turns are
// subtracted in two parts, whose products fmaf has exactly (Cody and Waite, Software Manual for the
// Elementary Functions, 1980).
__device__ __forceinline__ float2 rotation(int32_t position, float inv_freq) {
  constexpr double kTwoPi = 6.283185307179586;
  constexpr auto kUpper = static_cast<float>(kTwoPi);
  constexpr auto kLower = static_cast<float>(kTwoPi - kUpper);
  const auto at = static_cast<float>(position);
  const float angle = at * inv_freq;
  const float rest = fmaf(at, inv_freq, -angle);
  const float turns = rintf(angle * static_cast<float>(1.0 / kTwoPi));
  const float reduced = fmaf(-turns, kLower, fmaf(-turns, kUpper, angle) + rest);
  float2 turn;
  __sincosf(reduced, &turn.y, &turn.x);
  return turn;
}

}  // namespace int8_ops::cuda::attention
