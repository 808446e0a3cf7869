// The warpgroup that sums up the values' latents of a split, by its weights.
//
// Note [Latents as float16]
// The product's second operand is an int8 latent as float16, exact, by transposed ldmatrix: a
// 16-bit element of it is two neighbouring columns of one token, and of two tokens' elements
// byte_perm makes a pair of each column, its upper bytes those of 1024: the byte is 1024's last
// bits, and a subtraction leaves the value.
#pragma once

#include "../ptx/mma_f16.cuh"
#include "../ptx/mma_s8.cuh"
#include "sm90_block.cuh"

namespace int8_ops::cuda::attention {

// kQuads: fours of query rows a head, at most.
template <int kQuads>
struct SumMaker {
  const Block& block;
  const AttendArgs& args;
  RingBarriers v_ring;
  RingBarriers weights;
  RingPlace v_at;
  uint32_t weights_parity;
  int warp;
  int lane;

  // The number in the group of a row of the block, or -1.
  __device__ __forceinline__ int32_t group_row(const Task& task, int32_t quad,
                                               int32_t in_quad) const {
    const int32_t quads = kQuads == 1 ? 1 : args.plan.quads;
    const int32_t row = task.first_row + quad % quads * 4 + in_quad;
    if (quad >= task.heads * quads || row >= args.head_rows) return -1;
    return (task.first_head + quad / quads) * args.head_rows + row;
  }

  using Sums = float[2][2][4];  // of sixteen columns, of even and odd ones

  // Of sixteen tokens, a fragment of four words: see the note.
  static __device__ __forceinline__ void add_columns(const uint32_t (&weights)[4],
                                                     const uint32_t (&bytes)[4], Sums& sums) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t even[2];
      uint32_t odd[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t biased = bytes[i * 2 + half] ^ 0x80808080u;
        even[half] = minus_1152(__byte_perm(biased, 0x64646464u, 0x4240));
        odd[half] = minus_1152(__byte_perm(biased, 0x64646464u, 0x4341));
      }
      ptx::mma_m16n8k16_f16(sums[i][0], weights, even[0], even[1]);
      ptx::mma_m16n8k16_f16(sums[i][1], weights, odd[0], odd[1]);
    }
  }
  static __device__ __forceinline__ uint32_t minus_1152(uint32_t pair) {
    const __half2 y = __hsub2(*reinterpret_cast<const __half2*>(&pair), __float2half2_rn(1152.0F));
    return *reinterpret_cast<const uint32_t*>(&y);
  }

  // Columns of a chunk of `width`, whose first one is the slice's column `offset`.
  __device__ __forceinline__ void store_sums(const Task& task, const Sums& sums, int32_t slice,
                                             int32_t chunk, int32_t width, int32_t offset) const {
    const float* const row_factor = block.scratch().row_factor[slice];
    const int32_t column = chunk + warp * 32 + lane % 4 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t row = group_row(task, lane / 16 + half * 2, lane / 4 % 4);
      if (row < 0) continue;
      const float factor = row_factor[lane / 4 + half * 8];
      const int64_t at = args.partials.index(task.b * args.p.groups + task.group, task.split, row) *
                             args.partials.columns +
                         args.partials.column_of[slice] + offset + column;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (column + i * 16 >= width) continue;
        *reinterpret_cast<float4*>(args.partials.sums + at + i * 16) =
            make_float4(sums[i][0][half * 2] * factor, sums[i][1][half * 2] * factor,
                        sums[i][0][half * 2 + 1] * factor, sums[i][1][half * 2 + 1] * factor);
      }
    }
  }

  template <bool kPacked>
  __device__ __forceinline__ void sum_slice(const Task& task, int32_t slice) {
    const LatentSlice& s = args.p.v.slices[slice];
    const int32_t width = width_of(s);
    const int32_t boxes = (task.tokens + kBoxTokens - 1) / kBoxTokens;
    const int matrix_row = lane % 16;
    const uint32_t weights_row =
        block.at(args.plan.shared.weights) + slice * kWeightBytes + matrix_row * kSplitTokens * 2;
    // Matrix lane / 8: tokens 8 (lane / 8 % 2) .., sixteen columns lane / 16.
    const uint32_t bytes_row = block.at(args.plan.shared.v_ring) + matrix_row * kBoxWidth +
                               (((warp * 2 + lane / 16) ^ (matrix_row % 8)) * 16);
#pragma unroll 1
    for (int32_t chunk = 0; chunk < width; chunk += kBoxWidth) {
      Sums low = {};
      Sums high = {};
#pragma unroll 1
      for (int32_t box = 0; box < boxes; ++box) {
        v_ring.wait_full(v_at);
        // As many at once as there are registers for.
        constexpr int kSteps = kPacked ? 2 : 4;
#pragma unroll
        for (int first = 0; first < kBoxTokens / 16; first += kSteps) {
          uint32_t bytes[kSteps][4];
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            ptx::ldmatrix_x4_trans(
                bytes[step], bytes_row + v_at.stage * kBoxBytes + (first + step) * 16 * kBoxWidth);
          }
          if (first + kSteps == kBoxTokens / 16) ptx::mbarrier_arrive(v_ring.empty_at(v_at));
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            uint32_t w[4];
            const int token_chunk = (box * kBoxTokens + (first + step) * 16) / 8 + lane / 16;
            ptx::ldmatrix_x4(w, weights_row + ((token_chunk ^ (matrix_row % 8)) * 16));
            if constexpr (kPacked) {
              uint32_t upper[4];
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                upper[i] = bytes[step][i] & 0xf0f0f0f0u;
                bytes[step][i] = (bytes[step][i] << 4) & 0xf0f0f0f0u;
              }
              add_columns(w, upper, high);
            }
            add_columns(w, bytes[step], low);
          }
        }
        v_at.next(args.plan.shared.v_slots);
      }
      store_sums(task, low, slice, chunk, width, 0);
      if constexpr (kPacked) store_sums(task, high, slice, chunk, width, width);
    }
  }

  __device__ __forceinline__ void run() {
    block.for_each_task([&](const Task& task) {
      ptx::mbarrier_wait_parity(weights.full, weights_parity);
#pragma unroll 1
      for (int32_t slice = 0; slice < args.p.v.count; ++slice) {
        if (args.p.v.slices[slice].packed) {
          sum_slice<true>(task, slice);
        } else {
          sum_slice<false>(task, slice);
        }
      }
      ptx::mbarrier_arrive(weights.empty);
      weights_parity ^= 1;
    });
  }
};

}  // namespace int8_ops::cuda::attention
