// New latents to integers in the slots of a cache: a warp a slice of a token.
//
// Tokens are few and slices short, so it is latency that counts: lanes take neighbouring elements
// (slices start anywhere, so wider loads would often be barred), all loads of a round leave at
// once, and where a slice is longer than a round its second reading comes from L1.
#include <cassert>  // __assert_fail

#include "../launch.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/max_nan.cuh"
#include "../quantize/row_math.cuh"
#include "append.h"

namespace int8_ops::cuda::attention {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kAtOnce = 8;                 // elements that a lane loads together
constexpr int kRound = 32 * kAtOnce;       // of a warp
constexpr int kMaxParts = 2 * kMaxSlices;  // of both streams

// A slice of a stream.
struct Part {
  const void* x = nullptr;  // its first element of the first token
  DType dtype = DType::kFloat32;
  int64_t batch_stride = 0;  // elements of x
  int64_t group_stride = 0;
  int64_t token_stride = 0;
  LatentSlots to;
};

struct AppendArgs {
  Part parts[kMaxParts];
  const int64_t* slots = nullptr;
  int64_t capacity = 0;
  uint32_t count = 0;  // of parts
  uint32_t groups = 0;
  uint32_t tokens = 0;
  uint32_t warps = 0;  // with work
};

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }

__device__ __forceinline__ float warp_max(float m) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    m = ptx::max_nan_f32(m, __shfl_xor_sync(0xffffffffu, m, offset));
  }
  return m;
}

// This lane's elements of the round at `first`; zeros beyond `end`, which are nobody's maximum.
template <typename T>
__device__ __forceinline__ void load_round(const T* x, int64_t first, int64_t end,
                                           float (&y)[kAtOnce]) {
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const int64_t j = first + i * 32 + lane();
    y[i] = j < end ? as_float(x[j]) : 0.0F;
  }
}

template <typename T>
__device__ __forceinline__ void quantize_int8(const T* x, int64_t rank, int8_t* q, float* scale) {
  float amax = 0.0F;
  float y[kAtOnce];
  for (int64_t first = 0; first < rank; first += kRound) {
    load_round(x, first, rank, y);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) amax = ptx::max_nan_f32(amax, fabsf(y[i]));
  }
  const RowScale s = RowScale::from_amax(warp_max(amax));
  for (int64_t first = 0; first < rank; first += kRound) {
    if (rank > kRound) load_round(x, first, rank, y);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t j = first + i * 32 + lane();
      if (j < rank) q[j] = quantize_one(y[i], s);
    }
  }
  if (lane() == 0) *scale = s.stored;
}

__device__ __forceinline__ int32_t int4_of(float x, float scale) {
  return static_cast<int32_t>(fminf(fmaxf(rintf(__fdiv_rn(x, scale)), kInt4Low), kInt4High));
}

template <typename T>
__device__ __forceinline__ void quantize_int4(const T* x, int64_t rank, int8_t* q,
                                              float* scale_out) {
  const int64_t half = rank / 2;
  float high = 0.0F;
  float low = 0.0F;  // negated
  float y[kAtOnce];
  float z[kAtOnce];  // of the second half
  for (int64_t first = 0; first < half; first += kRound) {
    load_round(x, first, half, y);
    load_round(x + half, first, half, z);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      high = ptx::max_nan_f32(high, ptx::max_nan_f32(y[i], z[i]));
      low = ptx::max_nan_f32(low, ptx::max_nan_f32(-y[i], -z[i]));
    }
  }
  high = warp_max(high);
  low = warp_max(low);
  const bool finite = ptx::max_nan_f32(high, low) <= kMaxFinite;
  const float exact = __fdiv_rn(high >= low ? high : -low, kInt4Span);
  // No element of a row whose scale would be subnormal exceeds 8.5 of it: all round to 0.
  const float scale = fabsf(exact) < kMinNormalScale ? 1.0F : exact;
  for (int64_t first = 0; first < half; first += kRound) {
    if (half > kRound) {
      load_round(x, first, half, y);
      load_round(x + half, first, half, z);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t j = first + i * 32 + lane();
      const int32_t packed = (int4_of(y[i], scale) & 15) | int4_of(z[i], scale) << 4;
      if (j < half) q[j] = static_cast<int8_t>(finite ? packed : 0);
    }
  }
  if (lane() == 0) *scale_out = finite ? scale : __int_as_float(0x7fc00000);
}

template <typename T>
__device__ __forceinline__ void append(const Part& part, int64_t from, int8_t* q, float* scale) {
  const T* const x = static_cast<const T*>(part.x) + from;
  part.to.packed ? quantize_int4(x, part.to.rank, q, scale)
                 : quantize_int8(x, part.to.rank, q, scale);
}

__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ AppendArgs args) {
  ptx::grid_dependency_wait();
  const uint32_t index = blockIdx.x * kWarps + threadIdx.x / 32;
  if (index >= args.warps) return;
  const Part& part = args.parts[index % args.count];
  const uint32_t row = index / args.count;
  const uint32_t token = row % args.tokens;
  const uint32_t group = row / args.tokens % args.groups;
  const uint32_t batch = row / args.tokens / args.groups;
  const int64_t slot = args.slots[token];
  // What assert() becomes, without the path of this file and whatever NDEBUG says.
  if (slot < 0 || slot >= args.capacity) {
    __assert_fail("0 <= slots[i] < S", "int8_ops.latent_append", __LINE__, "append_kernel");
  }
  const LatentSlots& to = part.to;
  const int64_t from =
      batch * part.batch_stride + group * part.group_stride + token * part.token_stride;
  int8_t* const q =
      to.q + batch * to.q_batch_stride + group * to.q_group_stride + slot * to.q_token_stride;
  float* const scale =
      to.scale + batch * to.scale_batch_stride + group * to.scale_group_stride + slot;
  switch (part.dtype) {
    case DType::kFloat16:
      return append<__half>(part, from, q, scale);
    case DType::kBFloat16:
      return append<__nv_bfloat16>(part, from, q, scale);
    default:
      return append<float>(part, from, q, scale);
  }
}

}  // namespace

void append_latents(const LatentAppendParams& p) {
  AppendArgs args;
  for (const NewLatents* s : {&p.k, &p.v}) {
    const char* x = static_cast<const char*>(s->x);
    for (int64_t n = 0; n < s->count; ++n) {
      args.parts[args.count++] = {
          x, s->dtype, s->batch_stride, s->group_stride, s->token_stride, s->slices[n]};
      x += s->slices[n].rank * size_of(s->dtype);
    }
  }
  args.slots = p.slots;
  args.capacity = p.capacity;
  args.groups = static_cast<uint32_t>(p.groups);
  args.tokens = static_cast<uint32_t>(p.tokens);
  args.warps = static_cast<uint32_t>(
      checked_int32(p.batch * p.groups * p.tokens * args.count, "slices of new tokens"));
  LaunchShape shape;
  shape.grid = dim3((args.warps + kWarps - 1) / kWarps);
  shape.block = dim3(kThreads);
  launch<append_kernel>("latent_append", shape, p.ctx, args);
}

}  // namespace int8_ops::cuda::attention
