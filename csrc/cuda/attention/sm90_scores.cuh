// A warpgroup that makes scores: keys of 64 tokens by int8 products, turned, times the queries.
//
// Note [Keys in fragments]
// A key of the latents of a token is A . latent, exact int32 sums. The latents are wgmma's first
// operand, in registers for all heads of the block; 64 channels of A, 32 RoPE pairs of a head, are
// its second one, resident in shared memory. A thread then holds both halves of its pairs, of two
// tokens eight apart. It turns them by the first one's place in the tile, which is the same for
// every tile, so that cosines and sines stay in registers; what is left of the angle is in the
// queries, of which there are two: turned back by the tile's first position, for the first token,
// and by eight more, for the second (sm90_weights.cuh makes them). Rounded to float16 the keys are
// the first operand of another product, in registers as they are, and four query rows of both kinds
// are its eight columns.
//
// Note [One product at a time]
// A warpgroup waits for its product, turns the keys, and starts their scores' product and the next
// step's together; the other warpgroup's product is under way while it turns. Sums of the scores
// are moved out of their registers before a new product may write there: the compiler makes every
// product wait for the last one where it cannot tell sums that are read from sums under way.
#pragma once

#include "../ptx/ldmatrix.cuh"
#include "../ptx/opaque.cuh"
#include "../ptx/wgmma_f16.cuh"
#include "../ptx/wgmma_s8.cuh"
#include "rope.cuh"
#include "sm90_block.cuh"

namespace int8_ops::cuda::attention {

// kQuads: fours of query rows a head, at most.
template <int kSize, int kChunks, int kQuads>
struct ScoreMaker {
  static constexpr int kSteps = kSize / kStepChannels;
  using Sums = int32_t[kStepChannels / 2];
  using Latents = uint32_t[kChunks][4][4];  // of 128 values, of 32, a fragment
  using Turns = float2[4][2];               // of eight channels, of a thread's two
  using Keys = uint32_t[2][4];              // operands: first halves of sixteen pairs, second ones
  using Scores = float[kQuads][4];
  // A product is started as soon as the last one's keys are turned, beside their scores' products;
  // with three chunks of latents there are no registers for both.
  static constexpr bool kBeside = kChunks < 3 && kQuads == 1;
  static constexpr int kParts = kBeside ? 2 : 1;

  const Block& block;
  const AttendArgs& args;
  int warpgroup;
  RingBarriers k_ring;
  RingBarriers queries;
  RingBarriers scores;
  RingPlace k_at;
  PairPlace scores_at;

  // Asked for anew where registers are few, lest what is made of it is kept.
  static __device__ __forceinline__ int32_t own_thread() {
    auto thread = static_cast<int32_t>(threadIdx.x);
    if constexpr (kChunks > 2 || kSize == 64) ptx::make_opaque(thread);
    return thread;
  }

  // Known here where there is but one choice.
  __device__ __forceinline__ int32_t quads_of_head() const {
    return kQuads <= 2 ? kQuads : args.plan.quads;
  }

  // Latents of the warpgroup's tokens, from the ring to registers: what is missing is zero.
  __device__ __forceinline__ void take_latents(int32_t slice, Latents& latents) {
    const int thread = own_thread();
    const int lane = thread % 32;
    // Matrix lane / 8 of an ldmatrix: rows 8 (lane / 8 % 2) .., sixteen bytes lane / 16.
    const int row = thread % kWarpgroup / 32 * 16 + lane / 8 % 2 * 8 + lane % 8;
    const bool packed = args.p.k.slices[slice].packed;
    const int32_t chunks = args.k_chunks[slice];
    const uint32_t ring =
        block.at(args.plan.shared.k_ring) + warpgroup * args.plan.shared.k_slots * kBoxBytes;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (packed && i % 2 == 1) continue;
      if (i >= chunks) {
#pragma unroll
        for (int j = 0; j < 16; ++j) latents[i][j / 4][j % 4] = 0;
        if (packed && i + 1 < kChunks) {
#pragma unroll
          for (int j = 0; j < 16; ++j) latents[i + 1 < kChunks ? i + 1 : i][j / 4][j % 4] = 0;
        }
        continue;
      }
      k_ring.wait_full(k_at);
      const uint32_t box = ring + k_at.stage * kBoxBytes + row * kBoxWidth;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        ptx::ldmatrix_x4(latents[i][step], box + (((step * 2 + lane / 16) ^ (row % 8)) * 16));
      }
      ptx::mbarrier_arrive(k_ring.empty_at(k_at));
      k_at.next(args.plan.shared.k_slots);
      if (packed && i + 1 < kChunks) {
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          uint32_t& low = latents[i][j / 4][j % 4];
          latents[i + 1 < kChunks ? i + 1 : i][j / 4][j % 4] = low & 0xf0f0f0f0u;
          low = (low << 4) & 0xf0f0f0f0u;
        }
      }
    }
  }

  // Starts the product of 64 channels.
  static __device__ __forceinline__ void multiply(Sums& sums, const Latents& latents, uint64_t a) {
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        ptx::wgmma_s8(sums, latents[i][step], a + i * (kBoxBytes >> 4) + step * 2, i + step != 0);
      }
    }
    ptx::wgmma_commit_group();
  }

  // Sixteen of a step's pairs, turned: their first halves, and their second ones.
  static __device__ __forceinline__ void turn(const Sums& sums, const Turns& turns, int part,
                                              Keys& keys) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = part * 2 + i;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[2];
        float y[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const auto one = static_cast<float>(sums[4 * j + 2 * half + e]);
          const auto two = static_cast<float>(sums[4 * (j + 4) + 2 * half + e]);
          x[e] = one * turns[j][e].x - two * turns[j][e].y;
          y[e] = two * turns[j][e].x + one * turns[j][e].y;
        }
        keys[0][i * 2 + half] = pack_half2(x[0], x[1]);
        keys[1][i * 2 + half] = pack_half2(y[0], y[1]);
      }
    }
  }

  // Starts scores += a part's keys times the queries of every quad; a branch would make it wait, so
  // those past the last one repeat it.
  __device__ __forceinline__ void add_scores(const Keys& keys, uint64_t queries, int part,
                                             Scores& scores) const {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      ptx::wgmma_fence();
      const uint64_t own =
          queries + min(quad, quads_of_head() - 1) * (kSteps * kQueryStepBytes >> 4) + part * 2;
      ptx::wgmma_f16(scores[quad], keys[0], own);
      ptx::wgmma_f16(scores[quad], keys[1], own + 4);
    }
  }

  // Turns a step's sums and starts their scores. Without registers for all keys, one part after the
  // other.
  __device__ __forceinline__ void score_step(const Sums& sums, const Turns& turns, uint64_t queries,
                                             Keys (&keys)[kParts], Scores& scores) const {
    if constexpr (kBeside) {
#pragma unroll
      for (int part = 0; part < 2; ++part) turn(sums, turns, part, keys[part]);
#pragma unroll
      for (int part = 0; part < 2; ++part) add_scores(keys[part], queries, part, scores);
      ptx::wgmma_commit_group();
    } else {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        turn(sums, turns, part, keys[0]);
        add_scores(keys[0], queries, part, scores);
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<0>();
      }
    }
  }

  static __device__ __forceinline__ void settle(Scores& scores) {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) ptx::touch(scores[quad]);
  }
  static __device__ __forceinline__ void clear(Scores& scores) {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[quad][i] = 0.0F;
    }
    settle(scores);
  }
  static __device__ __forceinline__ void copy(const Scores& from, Scores& to) {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
#pragma unroll
      for (int i = 0; i < 4; ++i) ptx::move(to[quad][i], from[quad][i]);
    }
  }

  // Where a head's turned queries are.
  __device__ __forceinline__ uint64_t queries_of(const PairPlace& at, int32_t head) const {
    return ptx::wgmma_descriptor(block.at(args.plan.shared.queries) +
                                 (static_cast<int32_t>(at.stage()) * args.plan.heads + head) *
                                     quads_of_head() * (kSteps * kQueryStepBytes));
  }

  // The first token's scores of a quad are in columns 0..3, the second one's in 4..7. `out` is
  // where this thread's first two rows of the head are.
  __device__ __forceinline__ void store_scores(const Scores& scores, bool add, float token_scale,
                                               float* out) const {
    const bool second = threadIdx.x % 4 >= 2;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      if (quad >= quads_of_head()) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float one = scores[quad][e];
        const float two = scores[quad][2 + e];
        const float y = (second ? two : one) * token_scale;
        float& to = out[(quad * 4 + e) * kTileTokens];
        // Loaded either way: a branch would make products under way wait.
        const float before = to;
        to = add ? before + y : y;
      }
    }
  }

  // This thread's token of a tile that it has the scores of.
  static __device__ __forceinline__ int32_t token_in_tile() {
    const int32_t thread = own_thread();
    return thread / 32 * 16 + thread % 32 / 4 + thread % 4 / 2 * 8;
  }
  // Where its scores of a head's first two rows are.
  __device__ __forceinline__ float* scores_of(int32_t head) const {
    const int32_t row_floats = quads_of_head() * 4 * kTileTokens;
    return reinterpret_cast<float*>(block.storage + args.plan.shared.scores) +
           (static_cast<int32_t>(scores_at.stage()) * args.plan.heads + head) * row_floats +
           score_at(own_thread() % 2 * 2, token_in_tile());
  }
  __device__ __forceinline__ float token_scale_of(const Task& task, int32_t tile,
                                                  int32_t slice) const {
    const LatentSlice& s = args.p.k.slices[slice];
    const int32_t token = task.first_token + tile * kTileTokens + token_in_tile();
    if (token >= task.end) return 0.0F;
    return s.scale[task.b * s.scale_batch_stride + task.group * s.scale_group_stride + token];
  }

  __device__ __forceinline__ void run() {
    const int lane = threadIdx.x % 32;
    const int first_in_tile = threadIdx.x / 32 * 16 + lane / 4;
    Turns turns[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float inv_freq = args.p.inv_freq[s * 32 + j * 8 + lane % 4 * 2 + e];
          const float2 turn = rotation(first_in_tile, inv_freq);
          turns[s][j][e] = make_float2(turn.x * kKeyFactor, turn.y * kKeyFactor);
        }
      }
    }
    Barriers& barriers = block.barriers();
    const uint32_t a_full = ptx::shared_address(barriers.a_full);
    block.for_each_task([&](const Task& task) {
      const int32_t tiles = task.tiles();
      const int32_t heads = task.heads;
#pragma unroll 1
      for (int32_t tile = 0; tile < tiles; ++tile) {
        int32_t first_chunk = 0;
#pragma unroll 1
        for (int32_t slice = 0; slice < args.p.k.count; ++slice) {
          // Queries come a slice of a tile.
          const PairPlace queries_at{
              static_cast<uint32_t>(scores_at.count * args.p.k.count + slice)};
          const float token_scale = token_scale_of(task, tile, slice);
          Latents latents;
          take_latents(slice, latents);
          const uint64_t a = ptx::wgmma_descriptor(block.at(0) + first_chunk * kBoxBytes);
          const uint32_t step_units = args.plan.chunks * (kBoxBytes >> 4);
          const auto descriptor = [&](int32_t head, int step) {
            return a + static_cast<uint32_t>(head * kSteps + step) * step_units;
          };
          const auto wait_for_a = [&](int32_t head) {
            ptx::mbarrier_wait_parity(a_full + head * 8, task.lane_parity);
          };
          const auto finish = [&](int32_t head, const Scores& acc) {
            store_scores(acc, slice > 0, token_scale, scores_of(head));
          };
          wait_for_a(0);
          Sums sums;
          Keys keys[kParts];
          Scores acc;
          clear(acc);
          multiply(sums, latents, descriptor(0, 0));
          queries.wait_full(queries_at);
          const auto one_head = [&]<bool kLast>(int32_t head) {
            Scores before;
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
              ptx::wgmma_wait_group<0>();
              ptx::wgmma_touch(sums);
              settle(acc);
              if (step == 0) {
                if (kBeside) {
                  copy(acc, before);
                } else if (head > 0) {
                  finish(head - 1, acc);
                }
                clear(acc);
              }
              const bool more = !kLast || step + 1 < kSteps;
              if (step + 1 == kSteps) {
                if (!kLast) wait_for_a(head + 1);
                // Here the first scores are about to be stored.
                if (head == 0 && slice == 0) scores.wait_empty(scores_at);
              }
              score_step(sums, turns[step],
                         queries_of(queries_at, head) + step * (kQueryStepBytes >> 4), keys, acc);
              if (more) {
                multiply(sums, latents,
                         step + 1 < kSteps ? descriptor(head, step + 1) : descriptor(head + 1, 0));
              }
              if (kBeside && step == 0 && head > 0) finish(head - 1, before);
            }
          };
#pragma unroll 1
          for (int32_t head = 0; head + 1 < heads; ++head) {
            one_head.template operator()<false>(head);
          }
          one_head.template operator()<true>(heads - 1);
          ptx::wgmma_wait_group<0>();
          settle(acc);
          finish(heads - 1, acc);
          ptx::mbarrier_arrive(queries.empty_at(queries_at));
          first_chunk += args.k_chunks[slice];
        }
        ptx::mbarrier_arrive(scores.full_at(scores_at));
        scores_at.next();
      }
      // A may be replaced by the next lane's.
      if (task.lane_ends != 0) ptx::mbarrier_arrive(ptx::shared_address(&barriers.a_empty));
    });
  }
};

}  // namespace int8_ops::cuda::attention
