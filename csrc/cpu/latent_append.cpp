#include "latent_append.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "portable_floats.h"

namespace int8_ops::cpu {
namespace {

int8_t int4_of(float x, float scale) {
  return static_cast<int8_t>(std::clamp(std::nearbyint(x / scale), kInt4Low, kInt4High));
}

void quantize_int4(const void* x, DType dtype, int64_t first, int64_t rank, int8_t* q,
                   float* scale_out) {
  float high = -std::numeric_limits<float>::infinity();
  float low = -high;
  bool finite = true;
  for (int64_t j = 0; j < rank; ++j) {
    const float y = load_as_float(x, dtype, first + j);
    finite = finite && std::isfinite(y);
    high = std::max(high, y);
    low = std::min(low, y);
  }
  const int64_t half = rank / 2;
  if (!finite) {
    std::fill(q, q + half, int8_t{0});
    *scale_out = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  const float scale = (high >= -low ? high : low) / kInt4Span;
  // No element of a row whose scale would be subnormal exceeds 8.5 of it: all round to 0.
  *scale_out = std::fabs(scale) < kMinNormalScale ? 1.0F : scale;
  for (int64_t j = 0; j < half; ++j) {
    const int8_t one = int4_of(load_as_float(x, dtype, first + j), *scale_out);
    const int8_t two = int4_of(load_as_float(x, dtype, first + half + j), *scale_out);
    q[j] = static_cast<int8_t>((one & 15) | (two << 4));
  }
}

}  // namespace

void append_latents(const LatentAppendParams& p,
                    void (*quantize_rows)(const QuantizeParams& p, int64_t begin, int64_t end),
                    int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = row % p.tokens;
    const int64_t group = row / p.tokens % p.groups;
    const int64_t batch = row / p.tokens / p.groups;
    for (const NewLatents* s : {&p.k, &p.v}) {
      int64_t first = batch * s->batch_stride + group * s->group_stride + token * s->token_stride;
      for (int64_t n = 0; n < s->count; ++n) {
        const LatentSlots& slice = s->slices[n];
        int8_t* q = slice.q + batch * slice.q_batch_stride + group * slice.q_group_stride +
                    p.slots[token] * slice.q_token_stride;
        float* scale = slice.scale + batch * slice.scale_batch_stride +
                       group * slice.scale_group_stride + p.slots[token];
        if (slice.packed) {
          quantize_int4(s->x, s->dtype, first, slice.rank, q, scale);
        } else {
          QuantizeParams one;
          one.x = static_cast<const char*>(s->x) + first * size_of(s->dtype);
          one.x_dtype = s->dtype;
          one.q = q;
          one.scale = scale;
          one.rows = 1;
          one.cols = slice.rank;
          quantize_rows(one, 0, 1);
        }
        first += slice.rank;
      }
    }
  }
}

}  // namespace int8_ops::cpu
