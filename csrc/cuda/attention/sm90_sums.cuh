// The warpgroup that sums up the values' latents of a split, by its weights.
//
// Note [Latents as float16]
// The product's first operand is an int8 latent as float16, exact, transposed: its rows are columns
// of the latents, its columns are tokens. Transposed ldmatrix brings 16-bit elements, two
// neighbouring columns of one token; of two tokens' elements byte_perm makes a pair of each column,
// its upper bytes those of 1024: the byte is 1024's last bits, and a subtraction leaves the value.
// Row g of a warp's sixteen is column 2 g, and row g + 8 column 2 g + 1. The query rows' weights
// are the second operand, in shared memory.
#pragma once

#include "../ptx/ldmatrix.cuh"
#include "../ptx/load_global.cuh"
#include "../ptx/opaque.cuh"
#include "../ptx/wgmma_f16.cuh"
#include "../ptx/wgmma_s8.cuh"
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

  // Of 64 columns each: a box's two halves, or the low and the high values of packed bytes.
  using Sums = float[2][8];
  static constexpr int kBoxSteps = kBoxTokens / 16;
  // A step's two products' first operands.
  using Operands = uint32_t[2][4];

  // The number in the group of a row of the block, or -1.
  __device__ __forceinline__ int32_t group_row(const Task& task, int32_t number) const {
    const int32_t quad = number / 4;
    const int32_t head = kQuads == 1 ? quad : args.by_quads.quotient(quad);
    const int32_t row =
        task.first_row + (kQuads == 1 ? 0 : args.by_quads.remainder(quad) * 4) + number % 4;
    if (head >= task.heads || row >= args.head_rows) return -1;
    return (task.first_head + head) * args.head_rows + row;
  }

  static __device__ __forceinline__ uint32_t minus_1152(uint32_t pair) {
    const __half2 y = __hsub2(*reinterpret_cast<const __half2*>(&pair), __float2half2_rn(1152.0F));
    return *reinterpret_cast<const uint32_t*>(&y);
  }

  // Sixteen tokens, as transposed ldmatrix has them: see the note. Of packed bytes the first two
  // words hold the same as the others, and give the low values.
  static __device__ __forceinline__ void convert(const uint32_t (&bytes)[4], bool packed,
                                                 Operands& a) {
    const uint32_t mask = packed ? 0xf0f0f0f0u : ~0u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t upper = i < 2 && packed ? bytes[i] << 4 : bytes[i];
      const uint32_t biased = (upper & mask) ^ 0x80808080u;
      a[i / 2][i % 2 * 2] = minus_1152(__byte_perm(biased, 0x64646464u, 0x4240));
      a[i / 2][i % 2 * 2 + 1] = minus_1152(__byte_perm(biased, 0x64646464u, 0x4341));
    }
  }

  // Of the slice's bytes from `column` on, of which there are `width`; `apart` columns lie between
  // the two parts.
  __device__ __forceinline__ void store_sums(const Task& task, const Sums& sums, int32_t slice,
                                             int32_t column, int32_t width, int32_t apart) const {
    const float* const row_factor = block.scratch().row_factor[slice];
    const auto thread = static_cast<int32_t>(threadIdx.x % kWarpgroup);
    column += thread / 32 * 16 + thread % 32 / 4 * 2;
    if (column >= width) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t number = i / 2 * 8 + thread % 4 * 2 + i % 2;
      const int32_t row = group_row(task, number);
      if (row < 0) continue;
      const float factor = row_factor[number];
      float* const to = args.partials.sums + args.partials.column_of[slice] + column +
                        args.partials.index(task.b * args.p.groups + task.group, task.split, row) *
                            args.partials.columns;
      const int e = i / 2 * 4 + i % 2;
      *reinterpret_cast<float2*>(to) = make_float2(sums[0][e] * factor, sums[0][e + 2] * factor);
      if (column + apart >= static_cast<int32_t>(args.p.v.slices[slice].rank)) continue;
      *reinterpret_cast<float2*>(to + apart) =
          make_float2(sums[1][e] * factor, sums[1][e + 2] * factor);
    }
  }

  __device__ __forceinline__ void sum_slice(const Task& task, int32_t slice) {
    const LatentSlice& s = args.p.v.slices[slice];
    const bool packed = s.packed;
    const int32_t width = width_of(s);
    const int32_t boxes = (task.tokens + kBoxTokens - 1) / kBoxTokens;
    const auto thread = static_cast<int32_t>(threadIdx.x % kWarpgroup);
    const int32_t lane = thread % 32;
    const uint64_t weights_of_slice =
        ptx::wgmma_descriptor(block.at(args.plan.shared.weights) + slice * kWeightBytes);
    // Matrix lane / 8: tokens 8 (lane / 8 % 2) .., of both parts.
    const int32_t matrix_row = lane % 16;
    const int32_t matrix_column = thread / 32 + (packed ? 0 : lane / 16 * 4);
    const uint32_t bytes_row = block.at(args.plan.shared.v_ring) + matrix_row * kBoxWidth +
                               ((matrix_column ^ (matrix_row % 8)) * 16);
#pragma unroll 1
    for (int32_t column = 0; column < width; column += value_columns(packed)) {
      Sums sums = {};
      Operands a[2];  // of the product under way and the next one
#pragma unroll 1
      for (int32_t box = 0; box < boxes; ++box) {
        v_ring.wait_full(v_at);
        const uint64_t weights_of_box = weights_of_slice + box * (kBoxWeightBytes >> 4);
        const uint32_t from = bytes_row + v_at.stage * kBoxBytes;
        uint32_t bytes[2][4];  // of a step and the next one
        ptx::ldmatrix_x4_trans(bytes[0], from);
#pragma unroll
        for (int step = 0; step < kBoxSteps; ++step) {
          if (step + 1 < kBoxSteps) {
            ptx::ldmatrix_x4_trans(bytes[(step + 1) % 2], from + (step + 1) * 16 * kBoxWidth);
          } else {
            ptx::mbarrier_arrive(v_ring.empty_at(v_at));
          }
          ptx::wgmma_wait_group<1>();
          convert(bytes[step % 2], packed, a[step % 2]);
          ptx::wgmma_fence();
          ptx::wgmma_f16(sums[0], a[step % 2][0], weights_of_box + step * 2);
          ptx::wgmma_f16(sums[1], a[step % 2][1], weights_of_box + step * 2);
          ptx::wgmma_commit_group();
        }
        v_at.next(args.plan.shared.v_slots);
      }
      ptx::wgmma_wait_group<0>();
      ptx::touch(sums[0]);
      ptx::touch(sums[1]);
      store_sums(task, sums, slice, column, width, packed ? width : kBoxWidth / 2);
    }
  }

  // What the first task will ask for, to L2, before it is known and the latents queue up for
  // memory: the queries of few rows, and the scales of A. By some blocks for all, and by the
  // warpgroup whose own work begins last.
  __device__ __forceinline__ void prefetch_queries() const {
    constexpr int32_t kLineBytes = 128;
    constexpr int64_t kMostRows = 512;
    const LatentAttentionParams& p = args.p;
    if (blockIdx.x % 8 != 0) return;
    const int32_t thread = threadIdx.x % kWarpgroup;
    for (int32_t slice = 0; slice < p.k.count; ++slice) {
      const auto lines = static_cast<int32_t>(p.kv_heads * p.head_dim * sizeof(float) / kLineBytes);
      for (int32_t i = thread; i < lines; i += kWarpgroup) {
        ptx::prefetch_global_l2(p.k.slices[slice].a_scale + i * (kLineBytes / sizeof(float)));
      }
    }
    const int64_t rows = p.batch * p.heads * p.q_len;
    if (rows > kMostRows) return;
    const auto q_len = static_cast<int32_t>(p.q_len);
    const auto heads = static_cast<int32_t>(p.heads);
    for (int32_t i = thread; i < static_cast<int32_t>(rows); i += kWarpgroup) {
      const auto* const row = static_cast<const uint16_t*>(p.q) + i % q_len * p.q_token_stride +
                              i / q_len % heads * p.q_head_stride +
                              i / q_len / heads * p.q_batch_stride;
      ptx::prefetch_global_l2(row);
      if (p.head_dim * 2 > kLineBytes) ptx::prefetch_global_l2(row + kLineBytes / 2);
    }
  }

  __device__ __forceinline__ void run() {
    prefetch_queries();
    block.for_each_task([&](const Task& task) {
      ptx::mbarrier_wait_parity(weights.full, weights_parity);
#pragma unroll 1
      for (int32_t slice = 0; slice < args.p.v.count; ++slice) {
        sum_slice(task, slice);
      }
      ptx::mbarrier_arrive(weights.empty);
      weights_parity ^= 1;
    });
  }
};

}  // namespace int8_ops::cuda::attention
