// q * scale, rounded once: eight values a thread where rows allow it, one where they do not.
#include "../epilogue/convert.cuh"
#include "../launch.cuh"
#include "../ptx/grid_dependency.cuh"
#include "quantize.h"

namespace int8_ops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;

template <int kPerThread>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(DequantizeParams p) {
  ptx::grid_dependency_wait();
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPerThread;
  if (first >= p.rows * p.cols) return;
  const int64_t row = first / p.cols;
  const int64_t col = first - row * p.cols;
  if constexpr (kPerThread == 1) {
    const float scale = p.scale[p.scale_per_col ? col : row];
    store_float(p.out, p.out_dtype, first, __fmul_rn(static_cast<float>(p.q[first]), scale));
  } else {
    const uint2 packed = __ldg(reinterpret_cast<const uint2*>(p.q + first));
    const uint32_t words[2] = {packed.x, packed.y};
    float y[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const auto q = static_cast<int8_t>(words[e / 4] >> (8 * (e % 4)));
      const float scale = __ldg(p.scale + (p.scale_per_col ? col + e : row));
      y[e] = __fmul_rn(static_cast<float>(q), scale);
    }
    store_float_x8(p.out, p.out_dtype, first, y);
  }
}

template <int kPerThread>
void launch_dequantize(const DequantizeParams& p) {
  const int64_t per_block = static_cast<int64_t>(kThreads) * kPerThread;
  LaunchShape shape;
  shape.grid = dim3(checked_int32((p.rows * p.cols + per_block - 1) / per_block, "blocks"));
  shape.block = dim3(kThreads);
  launch<dequantize_kernel<kPerThread>>("dequantize", shape, p.ctx, p);
}

}  // namespace

void dequantize(const DequantizeParams& p) {
  const bool vector = p.cols % kVector == 0 && is_aligned(p.q, 8) && is_aligned(p.out, 16);
  vector ? launch_dequantize<kVector>(p) : launch_dequantize<1>(p);
}

}  // namespace int8_ops::cuda
