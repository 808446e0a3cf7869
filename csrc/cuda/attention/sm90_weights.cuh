// The warpgroup between scores and sums: it turns the queries for those that make scores, a tile
// ahead, and makes weights of the scores of a split.
//
// Note [First time]
// Instructions that no warp of a multiprocessor has executed come from L2, some twenty cycles each.
// A block's first split is a chain of those, and of short contexts the whole call. While the scores
// of its first split are made this warpgroup therefore weighs zeros, and tells nobody. What is
// loaded once is written as loops that are not unrolled. (Rehearsing the scores as well did not
// pay: their first time ends when the queries are there.)
#pragma once

#include "../ptx/ex2_approx.cuh"
#include "../ptx/opaque.cuh"
#include "../ptx/tma.cuh"
#include "rope.cuh"
#include "sm90_block.cuh"

namespace int8_ops::cuda::attention {

// The power of two at or below x, and the one that makes 1 of it; 1 where x is 0 or not finite, and
// what float32 can divide by in any case.
struct PowerOfTwo {
  uint32_t bits;

  static __device__ __forceinline__ PowerOfTwo below(float x) {
    constexpr uint32_t kOne = 127u << 23;
    const uint32_t bits = __float_as_uint(x) & 0x7f800000u;
    const bool usable = bits != 0 && bits != 0x7f800000u;
    return {usable ? min(max(bits, 27u << 23), 227u << 23) : kOne};
  }
  // Times 2^n.
  __device__ __forceinline__ float value(int n) const {
    return __uint_as_float(bits + (static_cast<uint32_t>(n) << 23));
  }
  // 2^n over it.
  __device__ __forceinline__ float inverse(int n) const {
    return __uint_as_float((254u << 23) - bits + (static_cast<uint32_t>(n) << 23));
  }
};

// Over the lanes whose numbers differ in the bits below kTo.
template <int kTo>
__device__ __forceinline__ float max_over_lanes(float x) {
#pragma unroll
  for (int step = 1; step < kTo; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// Of several numbers, over all lanes.
template <int kCount>
__device__ __forceinline__ void max_over_warp(float (&x)[kCount]) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
#pragma unroll
    for (float& value : x) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
  }
}

template <int kSize>
struct WeightMaker {
  static constexpr int kSteps = kSize / kStepChannels;
  static constexpr int kPairs = kSize / 2;
  static constexpr int kItems = kSteps * 2;  // of sixteen RoPE pairs: a warp turns one of a quad
  static constexpr int kQuadsApart = 4 / kItems;  // from one quad of a warp to the next
  static constexpr int kRowThreads = kWarpgroup / kBlockRows;  // that load a query row
  static constexpr int kOwnPairs = kPairs / kRowThreads;       // RoPE pairs of each
  static constexpr uint32_t kBarrier = 1;                      // named
  static constexpr int kAtOnce = 2;  // quads whose maxima and sums are made at once
  // A weight is an exponential times a token's scale over the largest one's power of two, times
  // this power: what float16 then loses of small ones is below 2^-36 of the largest.
  static constexpr int kWeightExponent = 12;

  const Block& block;
  const AttendArgs& args;
  RingBarriers queries;
  RingBarriers scores;
  RingBarriers weights;
  PairPlace queries_at;
  PairPlace scores_at;
  int warp;
  int lane;

  __device__ __forceinline__ void sync() const { ptx::named_barrier_sync(kBarrier, kWarpgroup); }

  // Quads of the lane's query rows, and one's first row among a head's and head of the group.
  __device__ __forceinline__ int32_t quads_of(const Task& task) const {
    return task.heads * args.plan.quads;
  }
  __device__ __forceinline__ int32_t first_row(const Task& task, int32_t quad) const {
    return task.first_row + args.by_quads.remainder(quad) * 4;
  }
  __device__ __forceinline__ int32_t head_of(const Task& task, int32_t quad) const {
    return task.first_head + args.by_quads.quotient(quad);
  }

  // ---- queries
  // ---------------------------------------------------------------------------------

  // A warp turns sixteen RoPE pairs of every kQuadsApart-th quad: a thread, of its row of each, the
  // first halves of two pairs, of the two eight pairs further on, and the second halves.
  __device__ __forceinline__ int32_t first_quad() const { return warp / kItems; }
  __device__ __forceinline__ int32_t pair_of(int i) const {
    return warp % kItems * 16 + i * 8 + lane % 4 * 2;
  }
  __device__ __forceinline__ int32_t row_in_quad() const { return lane / 4 % 4; }

  __device__ __forceinline__ float2 floats_of(uint32_t pair) const {
    if (args.p.q_dtype == DType::kFloat16) return half2_floats(pair);
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }

  // Where the queries of a row of a quad are, or nullptr where there is no such row.
  __device__ __forceinline__ const uint16_t* row_queries(const Task& task, int32_t quad,
                                                         int32_t row) const {
    row += first_row(task, quad);
    if (quad >= quads_of(task) || row >= args.head_rows) return nullptr;
    const int64_t head = (task.group * args.group_heads + head_of(task, quad)) * args.repeats +
                         args.by_q_len.quotient(row);
    return static_cast<const uint16_t*>(args.p.q) + task.b * args.p.q_batch_stride +
           head * args.p.q_head_stride + args.by_q_len.remainder(row) * args.p.q_token_stride;
  }
  __device__ __forceinline__ const float* key_scales(const Task& task, int32_t quad,
                                                     const LatentSlice& s) const {
    return s.a_scale + (task.group * args.group_heads + head_of(task, quad)) * kSize;
  }
  // Of a slice and a quad, [items][rows][lanes % 4] of sixteen bytes: the first halves of two
  // pairs, of the two eight pairs further on, and the second halves.
  __device__ __forceinline__ uint8_t* scaled_queries(int32_t slice, int32_t quad) const {
    return block.storage + args.plan.shared.scaled + (slice * kMaxQuads + quad) * (kItems * 256);
  }

  // The largest magnitude so far.
  static __device__ __forceinline__ float larger(float most, float2 two) {
    return fmaxf(most, fmaxf(fabsf(two.x), fabsf(two.y)));
  }

  // Queries of a row of the batch, times the keys' scales of A, in float16 to shared memory: both
  // over the powers of two that bring a row, and its head's scales, near 1. A few neighbouring
  // threads a row, of each a few neighbouring pairs.
  __device__ __forceinline__ void load_queries(const Task& task) const {
    WeightScratch& scratch = block.scratch();
    const int32_t thread = threadIdx.x % kWarpgroup;
    const int32_t number = thread / kRowThreads;
    const int32_t quad = number / 4;
    const int32_t pair = thread % kRowThreads * kOwnPairs;
    const uint16_t* const from = row_queries(task, quad, number % 4);
    const bool there = from != nullptr;
    uint32_t raw[2][kOwnPairs / 2];  // first halves, second ones
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kOwnPairs / 2; ++i) {
        raw[half][i] = 0;
        if (there) {
          raw[half][i] = *reinterpret_cast<const uint32_t*>(from + half * kPairs + pair + i * 2);
        }
      }
    }
    float most_a = 0.0F;
#pragma unroll 1
    for (int32_t slice = 0; slice < args.p.k.count; ++slice) {
      const float* const scales = key_scales(task, quad, args.p.k.slices[slice]) + pair;
#pragma unroll
      for (int i = 0; i < kOwnPairs; i += 2) {
        if (there) most_a = larger(most_a, *reinterpret_cast<const float2*>(scales + i));
      }
    }
    float most = 0.0F;
#pragma unroll
    for (int i = 0; i < kOwnPairs / 2; ++i) {
      most = larger(larger(most, floats_of(raw[0][i])), floats_of(raw[1][i]));
    }
    const PowerOfTwo q = PowerOfTwo::below(max_over_lanes<kRowThreads>(most));
    const PowerOfTwo a = PowerOfTwo::below(max_over_lanes<kRowThreads>(most_a));
    sync();  // what is written below may be in use still
    if (thread % kRowThreads == 0) {
      scratch.score_factor[number] =
          fabsf(args.p.scaling) * kLog2E * q.value(0) * a.value(kKeyExponent);
      const int32_t row = first_row(task, quad) + number % 4;
      // The last lane's may be in use still.
      scratch.rows[task.lane_parity][number] = {
          args.by_q_len.remainder(row), there ? head_of(task, quad) * args.head_rows + row : -1};
    }
    if (!there) return;
    // A negative factor of the scores, too, is the queries'.
    const float query_factor = copysignf(q.inverse(0), args.p.scaling);
    const int32_t at = pair / 16 * 256 + number % 4 * 64 + pair % 8 / 2 * 16 + pair / 8 % 2 * 4;
#pragma unroll 1
    for (int32_t slice = 0; slice < args.p.k.count; ++slice) {
      const LatentSlice& s = args.p.k.slices[slice];
      const float* const scales = key_scales(task, quad, s) + pair;
      const float factor = a.inverse(0) * (s.packed ? kPackedFactor : 1.0F);
      uint8_t* const out = scaled_queries(slice, quad) + at;
#pragma unroll
      for (int i = 0; i < kOwnPairs / 2; ++i) {
        float2 two = *reinterpret_cast<const float2*>(scales + i * 2);
        const float2 other = *reinterpret_cast<const float2*>(scales + i * 2 + kPairs);
        // The channels of a RoPE pair are rotated as integers: no result without a common scale.
        if (two.x != other.x || two.y != other.y) two.x = NAN;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 y = floats_of(raw[half][i]);
          *reinterpret_cast<uint32_t*>(out + i * 16 + half * 8) = pack_half2(
              y.x * query_factor * (two.x * factor), y.y * query_factor * (two.y * factor));
        }
      }
    }
  }

  // Queries of the lane turned back by a tile's first position, and for the upper half of the
  // fragment's columns by eight more.
  __device__ __forceinline__ void turn_queries(const Task& task, int32_t tile, int32_t slice) {
    WeightScratch& scratch = block.scratch();
    float2* const turn = scratch.turns[queries_at.stage()];
    const int thread = threadIdx.x % kWarpgroup;
    if (thread < 2 * kPairs) {
      const int32_t origin =
          args.p.origin != nullptr ? args.p.origin[task.b] : -args.p.start[task.b];
      const int32_t position = task.first_token + tile * kTileTokens + origin;
      turn[thread] = rotation(position + thread / kPairs * 8, scratch.inv_freq[thread % kPairs]);
    }
    queries.wait_empty(queries_at);
    sync();
    float4 turn_of[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      turn_of[i] = *reinterpret_cast<const float4*>(&turn[lane / 16 * kPairs + pair_of(i)]);
    }
    // Of an operand's eight rows, 64 channels in each: the first halves of 32 pairs, then the
    // second ones.
    const int32_t operand_row = lane / 16 * 4 + row_in_quad();
    uint8_t* const out =
        block.storage + args.plan.shared.queries +
        queries_at.stage() * args.plan.heads * args.plan.quads * kSteps * kQueryStepBytes +
        warp % kItems / 2 * kQueryStepBytes + operand_row * 128 + lane % 4 * 4;
    const int32_t quads = quads_of(task);
#pragma unroll 1
    for (int32_t quad = first_quad(); quad < quads; quad += kQuadsApart) {
      const uint4 scaled = *reinterpret_cast<const uint4*>(scaled_queries(slice, quad) +
                                                           warp % kItems * 256 + lane % 16 * 16);
      const float2 x[2] = {half2_floats(scaled.x), half2_floats(scaled.y)};
      const float2 y[2] = {half2_floats(scaled.z), half2_floats(scaled.w)};
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 t = turn_of[i];
        words[i] = pack_half2(x[i].x * t.x + y[i].x * t.y, x[i].y * t.z + y[i].y * t.w);
        words[2 + i] = pack_half2(y[i].x * t.x - x[i].x * t.y, y[i].y * t.z - x[i].y * t.w);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t chunk = (i / 2 * 4 + warp % 2 * 2 + i % 2) ^ operand_row;
        *reinterpret_cast<uint32_t*>(out + quad * kSteps * kQueryStepBytes + chunk * 16) = words[i];
      }
    }
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(queries.full_at(queries_at));
    queries_at.next();
  }

  // ---- weights
  // ---------------------------------------------------------------------------------

  static constexpr int kLaneTokens = kSplitTokens / 32;

  // Token `x` of this thread's eight of a split.
  __device__ __forceinline__ int32_t token_of(int x) const {
    return x / 4 * kTileTokens + lane * 4 + x % 4;
  }
  // A warp weighs a row of each quad. Tokens of the split that it sees:
  __device__ __forceinline__ int2 seen_by(const Task& task, int32_t row) const {
    const int2 seen = tokens_seen(args.p, {task.begin, task.end, 0, 0},
                                  block.scratch().rows[task.lane_parity][row].new_token);
    return make_int2(seen.x - task.first_token, seen.y - task.first_token);
  }
  // Whether all rows see all of a split that is full.
  __device__ __forceinline__ bool all_seen(const Task& task) const {
    const auto q_len = static_cast<int32_t>(args.p.q_len);
    const int2 first = tokens_seen(args.p, {task.begin, task.end, 0, 0}, 0);
    const int2 last = tokens_seen(args.p, {task.begin, task.end, 0, 0}, q_len - 1);
    return first.y >= task.first_token + kSplitTokens && last.x <= task.first_token;
  }

  __device__ __forceinline__ void take_scores(int32_t tiles, int32_t quads, bool real,
                                              float (&y)[kMaxQuads][kLaneTokens]) {
    const auto* const all = reinterpret_cast<const float*>(block.storage + args.plan.shared.scores);
    const int32_t stage_floats = args.plan.heads * args.plan.quads * 4 * kTileTokens;
#pragma unroll
    for (int tile = 0; tile < kTilesPerSplit; ++tile) {
#pragma unroll
      for (int quad = 0; quad < kMaxQuads; ++quad) {
        float4 four = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
        if (tile < tiles && quad < quads && real) {
          four = *reinterpret_cast<const float4*>(
              &all[scores_at.stage() * stage_floats + score_at(quad * 4 + warp, lane * 4)]);
        }
        y[quad][tile * 4] = four.x;
        y[quad][tile * 4 + 1] = four.y;
        y[quad][tile * 4 + 2] = four.z;
        y[quad][tile * 4 + 3] = four.w;
      }
      if (tile < tiles && real) {
        ptx::mbarrier_arrive(scores.empty_at(scores_at));
        scores_at.next();
      }
    }
  }

  __device__ __forceinline__ void wait_for_scores(int32_t tiles) const {
    PairPlace at = scores_at;
    for (int32_t tile = 0; tile < tiles; ++tile, at.next()) scores.wait_full(at);
  }

  // Scores of a split, waited for -> exponentials and their statistics, and, times the token scales
  // of each slice of values, weights in float16. `factors`: of the scores of this lane's row. With
  // !real nothing of it is told to anyone: see Note [First time].
  template <bool kAll>
  __device__ __forceinline__ void weigh(const Task& task, float factors, uint32_t parity,
                                        bool real) {
    const int32_t quads = quads_of(task);
    float y[kMaxQuads][kLaneTokens];
    take_scores(task.tiles(), quads, real, y);
    // Quads at once also where one is absent: that takes no longer, and no branch parts them.
#pragma unroll
    for (int first = 0; first < kMaxQuads; first += kAtOnce) {
      if (first >= quads) break;
      float most[kAtOnce];
      float total[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int2 seen = kAll ? make_int2(0, kSplitTokens) : seen_by(task, (first + i) * 4 + warp);
        most[i] = -INFINITY;
#pragma unroll
        for (int x = 0; x < kLaneTokens; ++x) {
          float& own = y[first + i][x];
          if (!kAll && !(token_of(x) >= seen.x && token_of(x) < seen.y)) own = -INFINITY;
          most[i] = fmaxf(most[i], own);
        }
      }
      max_over_warp(most);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float factor = __shfl_sync(~0u, factors, (first + i) * 4 + warp);
        // Scores of NaN alone have no maximum.
        most[i] = most[i] == -INFINITY ? 0.0F : most[i] * factor;
        total[i] = 0.0F;
#pragma unroll
        for (int x = 0; x < kLaneTokens; ++x) {
          float& own = y[first + i][x];
          own = ptx::ex2_approx(fmaf(own, factor, -most[i]));
          total[i] += own;
        }
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
#pragma unroll
        for (float& sum : total) sum += __shfl_xor_sync(~0u, sum, step);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = (first + i) * 4 + warp;
        const int2 seen = kAll ? make_int2(0, kSplitTokens) : seen_by(task, row);
        const bool any = max(seen.x, 0) < min(seen.y, kSplitTokens);
        if (ptx::lane_number() == 0) {
          block.scratch().stats[row] = make_float2(any ? most[i] : -INFINITY, total[i]);
        }
      }
    }
    __syncwarp();
    if (real) store_stats(task);
    __syncwarp();  // before the next split's are written
    if (real) ptx::mbarrier_wait_parity(weights.empty, parity ^ 1);
#pragma unroll 1
    for (int32_t slice = 0; slice < args.p.v.count; ++slice) store_weights<kAll>(task, slice, y);
    if (!real) return;
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive(weights.full);
  }

  // A lane a row of the warp's.
  __device__ __forceinline__ void store_stats(const Task& task) const {
    const int32_t number = lane * 4 + warp;
    if (number >= quads_of(task) * 4) return;
    const WeightScratch& scratch = block.scratch();
    const int32_t row = scratch.rows[task.lane_parity][number].group_row;
    if (row < 0) return;
    const int64_t at = args.partials.index(task.b * args.p.groups + task.group, task.split, row);
    args.partials.stats[at] = scratch.stats[number];
  }

  template <bool kAll>
  __device__ __forceinline__ void store_weights(const Task& task, int32_t slice,
                                                const float (&y)[kMaxQuads][kLaneTokens]) const {
    const LatentSlice& s = args.p.v.slices[slice];
    const int32_t quads = quads_of(task);
    const float* const scales = s.scale + task.b * s.scale_batch_stride +
                                task.group * s.scale_group_stride + task.first_token;
    float scale[kLaneTokens];
    float most = 0.0F;
#pragma unroll
    for (int x = 0; x < kLaneTokens; ++x) {
      scale[x] = kAll || token_of(x) < task.tokens ? scales[token_of(x)] : 0.0F;
      if (kAll) most = fmaxf(most, fabsf(scale[x]));
    }
    if (kAll) most = max_over_lanes<32>(most);
    uint8_t* const out = block.storage + args.plan.shared.weights + slice * kWeightBytes +
                         lane / 16 * kBoxWeightBytes + lane % 2 * 8;
    WeightScratch& scratch = block.scratch();
#pragma unroll
    for (int quad = 0; quad < kMaxQuads; ++quad) {
      if (quad >= quads) break;
      const int row = quad * 4 + warp;
      const int2 seen = kAll ? make_int2(0, kSplitTokens) : seen_by(task, row);
      const auto sees = [&](int x) {
        return kAll || (token_of(x) >= seen.x && token_of(x) < seen.y);
      };
      if (!kAll) {
        // What a row doesn't see must not change its bits.
        most = 0.0F;
#pragma unroll
        for (int x = 0; x < kLaneTokens; ++x) {
          if (sees(x)) most = fmaxf(most, fabsf(scale[x]));
        }
        most = max_over_lanes<32>(most);
      }
      const PowerOfTwo power = PowerOfTwo::below(most);
      const float factor = power.inverse(kWeightExponent);
#pragma unroll
      for (int tile = 0; tile < kTilesPerSplit; ++tile) {
        float z[4];
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const int at = tile * 4 + x;
          // Chosen, not multiplied by 0: the scale of what isn't seen may be anything.
          z[x] = sees(at) ? y[quad][at] * (scale[at] * factor) : 0.0F;
        }
        const int chunk = (lane % 16 / 2) ^ (row % 8);
        *reinterpret_cast<uint2*>(out + tile * (2 * kBoxWeightBytes) + row * (kBoxTokens * 2) +
                                  chunk * 16) =
            make_uint2(pack_half2(z[0], z[1]), pack_half2(z[2], z[3]));
      }
      if (ptx::lane_number() == 0) {
        scratch.row_factor[slice][row] =
            power.value(-kWeightExponent) * (s.packed ? kPackedFactor : 1.0F);
      }
    }
  }

  __device__ __forceinline__ void run() {
    if (threadIdx.x % kWarpgroup < kPairs) {
      const int pair = threadIdx.x % kWarpgroup;
      block.scratch().inv_freq[pair] = args.p.inv_freq[pair];
    }
    sync();
    const RingBarriers ring = Block::ring(block.barriers().tasks);
    const Task* const tasks = block.head().tasks;
    // Queries are turned ahead of the task that is weighed, at most to the end of the next one.
    RingPlace at;
    RingPlace ahead_at;
    bool ahead_is_next = false;
    int32_t ahead_tile = 0;
    int32_t ahead_slice = 0;
    int32_t loaded = -1;    // a row, and whether its lane is of even or odd number
    float factors[2] = {};  // of this lane's row, of the task that is weighed and the next one
    // Does nothing where there are no more tasks.
    const auto turn_next = [&] {
      ring.wait_full(ahead_at);
      const Task& task = tasks[ahead_at.stage];
      if (task.stop != 0) return;
      if (const int32_t wanted = task.b * 2 + task.lane_parity; loaded != wanted) {
        load_queries(task);
        loaded = wanted;
      }
      turn_queries(task, ahead_tile, ahead_slice);
      // Its barrier is behind the loading of the row's queries as well.
      const float factor = block.scratch().score_factor[lane % kBlockRows];
      factors[0] = ahead_is_next ? factors[0] : factor;
      factors[1] = ahead_is_next ? factor : factors[1];
      if (++ahead_slice < args.p.k.count) return;
      ahead_slice = 0;
      if (++ahead_tile < task.tiles()) return;
      ahead_tile = 0;
      ahead_at.next(kTasks);
      ahead_is_next = true;
    };
#pragma unroll 1
    for (;;) {
      ring.wait_full(at);
      const Task& task = tasks[at.stage];
      if (task.stop != 0) return;
      // All of this task's queries and a first of the next one's, for which the scores below don't
      // wait; and another one of these when the scores are there.
      const auto next_place = [&] {
        RingPlace next = at;
        next.next(kTasks);
        return next.stage;
      };
      bool there = false;  // the scores
      for (int32_t more = 1;;) {
        if (!ahead_is_next || (more > 0 && ahead_at.stage == next_place())) {
          more -= ahead_is_next;
          turn_next();
          continue;
        }
        if (there || scores_at.count == 0) {
          if (all_seen(task)) {
            weigh<true>(task, factors[0], at.stage % 2, there);
          } else {
            weigh<false>(task, factors[0], at.stage % 2, there);
          }
          if (there) break;
        }
        wait_for_scores(task.tiles());
        there = true;
        more = 1;
      }
      factors[0] = factors[1];
      ahead_is_next = ahead_at.stage != next_place();
      ptx::mbarrier_arrive(ring.empty_at(at));
      at.next(kTasks);
    }
  }
};

}  // namespace int8_ops::cuda::attention
