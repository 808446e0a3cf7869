// The Hopper path's plan: what it serves, shared memory, tensor maps, launch.
#include "sm90_plan.h"

#include <algorithm>
#include <array>

#include "../launch.cuh"
#include "../sm90/tensor_map.h"

namespace int8_ops::cuda::attention {

template <int kSize, int kChunks, int kQuads>
void launch_attend(const AttendArgs& args, const LaunchShape& shape);

namespace {

constexpr int32_t kWantedValueSlots = 8;

constexpr int32_t ceil_div(int64_t x, int64_t y) { return static_cast<int32_t>((x + y - 1) / y); }

// The shared memory of a block that holds `heads` heads of A.
AttendShared divide(const LatentAttentionParams& p, const AttendPlan& plan, int32_t heads,
                    int32_t limit) {
  const auto head_dim = static_cast<int32_t>(p.head_dim);
  const int32_t quads = plan.quads;
  const int32_t steps = head_dim / kStepChannels;
  const int32_t a_bytes = heads * steps * plan.chunks * kBoxBytes;
  const int32_t rows = heads * quads * 4;
  const int32_t scores = kTilesPerSplit * rows * kTileTokens * 4;
  const auto weights = static_cast<int32_t>(p.v.count) * kWeightBytes;
  const int32_t scaled = static_cast<int32_t>(p.k.count) * kBlockRows * head_dim * 2;
  const int32_t queries = kQueryBuffers * heads * quads * steps * kQueryStepBytes;
  const int32_t fixed = a_bytes + scores + weights + scaled + queries + kHeadBytes;
  AttendShared shared;
  const int32_t slots = fixed < limit ? (limit - fixed) / kBoxBytes : 0;
  if (slots < 4) return shared;
  // A tile's latents are taken to registers at once: the ring holds a tile or two.
  shared.k_slots = std::min(std::min(2 * plan.max_chunks, (slots - 2) / 2), kMaxRingSlots);
  shared.v_slots = std::min(slots - 2 * shared.k_slots, kWantedValueSlots);
  uint32_t at = static_cast<uint32_t>(a_bytes);
  const auto take = [&](int32_t bytes) {
    const uint32_t taken = at;
    at += static_cast<uint32_t>(bytes);
    return taken;
  };
  shared.k_ring = take(2 * shared.k_slots * kBoxBytes);
  shared.v_ring = take(shared.v_slots * kBoxBytes);
  shared.scores = take(scores);
  shared.weights = take(weights);
  shared.scaled = take(scaled);
  shared.queries = take(queries);
  shared.head = take(kHeadBytes);
  shared.bytes = at;
  return shared;
}

AttendPlan plan_for(const LatentAttentionParams& p, int64_t head_rows, int32_t limit) {
  AttendPlan plan;
  for (int64_t i = 0; i < p.k.count; ++i) {
    plan.chunks += chunks_of(p.k.slices[i]);
    plan.max_chunks = std::max(plan.max_chunks, chunks_of(p.k.slices[i]));
  }
  plan.quads = std::min(max_quads(p.head_dim, plan.max_chunks), ceil_div(head_rows, 4));
  plan.row_blocks = ceil_div(head_rows, plan.quads * 4);
  const auto group_heads = static_cast<int32_t>(p.kv_heads / p.groups);
  for (int32_t heads = std::min(kMaxQuads / plan.quads, group_heads); heads > 0; --heads) {
    plan.heads = heads;
    plan.shared = divide(p, plan, heads, limit);
    if (plan.shared.k_slots > 0) break;
  }
  return plan;
}

// Measured on an H100: keys of a split, their weights, and the sums, each by warpgroups of its own.
LaneChoice lane_choice(const LatentAttentionParams& p, const AttendPlan& plan, int32_t heads,
                       int32_t columns, int32_t blocks) {
  LaneChoice choice;
  const auto group_heads = static_cast<int32_t>(p.kv_heads / p.groups);
  choice.lanes = static_cast<int32_t>(p.groups) * ceil_div(group_heads, heads) * plan.row_blocks;
  const int32_t sharing = std::max(1, blocks / choice.lanes);
  choice.sharing = Divisor::of(sharing);
  choice.group_lanes = Divisor::of(ceil_div(group_heads, heads) * plan.row_blocks);
  choice.lane_step = std::max(1, blocks / sharing);
  choice.turns = ceil_div(choice.lanes, blocks);
  const int32_t keys = static_cast<int32_t>(p.head_dim) * std::max(9 * plan.chunks, 15) * heads;
  const int32_t weights = 3000 + 800 * heads * plan.quads;
  const int32_t sums = 1000 + 24 * columns;
  choice.first = keys + weights + sums;
  choice.next = std::max({keys, weights, sums});
  return choice;
}

std::string why_not_slice(const LatentAttentionParams& p, const LatentSlice& s) {
  const auto odd = [](int64_t count, int64_t stride) { return count > 1 && stride % 16 != 0; };
  if (s.rank % 32 != 0) {
    return "it takes ranks that are multiples of 32, and one is " + std::to_string(s.rank);
  }
  if (!is_aligned(s.q, 16) || !is_aligned(s.a, 16) || !is_aligned(s.a_scale, 8) ||
      odd(p.capacity, s.q_token_stride) || odd(p.groups, s.q_group_stride) ||
      odd(p.batch, s.q_batch_stride)) {
    return "it takes latents at multiples of 16 bytes";
  }
  return "";
}

}  // namespace

std::string why_not_sm90(const LatentAttentionParams& p, const DeviceFacts& device) {
  if (!device.sm90) return "the device, or the build, is not for sm_90a";
  if (p.q_dtype == DType::kFloat32) return "it takes 16-bit queries, and they are float32";
  if (p.head_dim != 64 && p.head_dim != 128) {
    return "it takes heads of 64 or 128, and they have " + std::to_string(p.head_dim);
  }
  if (!is_aligned(p.q, 4) || p.q_batch_stride % 2 != 0 || p.q_head_stride % 2 != 0 ||
      p.q_token_stride % 2 != 0) {
    return "it takes queries at multiples of 4 bytes";
  }
  if (p.k.bias != nullptr) return "it takes keys without a bias";
  for (const LatentStream* stream : {&p.k, &p.v}) {
    for (int64_t i = 0; i < stream->count; ++i) {
      const std::string why = why_not_slice(p, stream->slices[i]);
      if (!why.empty()) return why;
    }
  }
  for (int64_t i = 0; i < p.k.count; ++i) {
    if (chunks_of(p.k.slices[i]) > kMaxChunks) {
      return "it takes a rank of keys up to " + std::to_string(kMaxChunks * kBoxWidth) +
             ", and one is " + std::to_string(p.k.slices[i].rank);
    }
  }
  // Of as many new tokens as there may be: what serves one serves all.
  if (plan_for(p, 4 * kMaxQuads, device.shared_bytes_per_block).shared.k_slots == 0) {
    return "the keys' A of a head does not fit a block's shared memory";
  }
  return "";
}

void sm90_attend(const LatentAttentionParams& p, const Partials& partials,
                 const DeviceFacts& device) {
  AttendArgs args;
  args.p = p;
  args.partials = partials;
  args.group_heads = static_cast<int32_t>(p.kv_heads / p.groups);
  args.repeats = static_cast<int32_t>(p.heads / p.kv_heads);
  args.head_rows = args.repeats * static_cast<int32_t>(p.q_len);
  args.plan = plan_for(p, args.head_rows, device.shared_bytes_per_block);
  args.by_quads = Divisor::of(args.plan.quads);
  args.by_q_len = Divisor::of(static_cast<int32_t>(p.q_len));
  args.by_row_blocks = Divisor::of(args.plan.row_blocks);
  for (int32_t heads = 1; heads <= args.plan.heads; ++heads) {
    args.plan.choices[heads - 1] =
        lane_choice(p, args.plan, heads, partials.columns, device.sm_count);
  }
  const auto latents = [&](const LatentSlice& s) {
    return sm90::make_tensor_map({s.q, width_of(s), p.capacity, p.groups, p.batch, s.q_token_stride,
                                  s.q_group_stride, s.q_batch_stride},
                                 kBoxTokens);
  };
  for (int64_t i = 0; i < p.k.count; ++i) {
    const LatentSlice& s = p.k.slices[i];
    args.k_chunks[i] = chunks_of(s);
    args.k_maps[i] = latents(s);
    args.a_maps[i] = sm90::make_tensor_map(s.a, p.kv_heads * p.head_dim, s.rank, 1, 32);
  }
  for (int64_t i = 0; i < p.v.count; ++i) args.v_maps[i] = latents(p.v.slices[i]);

  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(device.sm_count));
  shape.block = dim3(kAttendThreads);
  shape.shared_bytes = args.plan.shared.bytes;
  using Launcher = void (*)(const AttendArgs&, const LaunchShape&);
  static constexpr std::array<Launcher, 4 * kMaxChunks> kLaunchers = {
      launch_attend<64, 1, 1>,
      launch_attend<64, 2, 1>,
      launch_attend<64, 3, 1>,
      launch_attend<64, 4, 1>,
      launch_attend<128, 1, 1>,
      launch_attend<128, 2, 1>,
      launch_attend<128, 3, 1>,
      launch_attend<128, 4, 1>,
      launch_attend<64, 1, max_quads(64, 1)>,
      launch_attend<64, 2, max_quads(64, 2)>,
      launch_attend<64, 3, max_quads(64, 3)>,
      launch_attend<64, 4, max_quads(64, 4)>,
      launch_attend<128, 1, max_quads(128, 1)>,
      launch_attend<128, 2, max_quads(128, 2)>,
      launch_attend<128, 3, max_quads(128, 3)>,
      launch_attend<128, 4, max_quads(128, 4)>};
  const int32_t launcher = (args.plan.quads > 1 ? 2 * kMaxChunks : 0) +
                           (p.head_dim == 128 ? kMaxChunks : 0) + args.plan.max_chunks - 1;
  kLaunchers.at(static_cast<size_t>(launcher))(args, shape);
}

}  // namespace int8_ops::cuda::attention
