#include <algorithm>

#include "../launch.cuh"
#include "combine.h"
#include "fold.cuh"
#include "fold_and_project.cuh"
#include "project.cuh"

namespace int8_ops::cuda::attention {
namespace {

// Blocks a multiprocessor up to which a fold's rows count as few.
constexpr int64_t kNarrowBlocks = 4;
// Blocks of the projection that are resident on a multiprocessor.
constexpr int64_t kProjectBlocks = 4;
// What one kernel may keep of its rows, and read of all partial results, each part for itself.
constexpr int64_t kSmallRowBytes = 32 * 1024;
constexpr int64_t kSmallReadBytes = 16 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t query_rows(const LatentAttentionParams& p, const Partials& partials) {
  return p.batch * p.groups * partials.group_rows;
}

// Tiles of kProjectRows query rows of a head.
int64_t head_tiles(const CombineArgs& args) {
  return args.p.batch * args.p.kv_heads * static_cast<int64_t>(args.by_row_tiles.divisor);
}

template <int32_t kVectors>
void launch_fold(CombineArgs args) {
  const int64_t chunks = ceil_div(args.partials.columns, kVectors * 4);
  args.by_chunks = Divisor::of(static_cast<int32_t>(chunks));
  LaunchShape shape;
  shape.grid = dim3(checked_int32(query_rows(args.p, args.partials) * chunks, "blocks"));
  shape.block = dim3(kFoldThreads);
  launch<fold_splits_kernel<kVectors>>("latent_attention_decode", shape, args.p.ctx, args);
}

// With blocks of `threads`, as many of a head's parts as there are elements for, up to `most`.
LaunchShape shape_of_project(CombineArgs& args, int32_t threads, int64_t most) {
  const LatentAttentionParams& p = args.p;
  const int64_t parts = ceil_div(p.head_dim, threads / 32 * kProjectElements);
  args.parts = static_cast<int32_t>(std::clamp<int64_t>(most, 1, parts));
  args.by_parts = Divisor::of(args.parts);
  LaunchShape shape;
  shape.grid = dim3(checked_int32(head_tiles(args) * args.parts, "blocks"));
  shape.block = dim3(threads);
  return shape;
}

void launch_project(CombineArgs args, const DeviceFacts& device) {
  // More blocks than are resident only begin again what those have begun.
  const LaunchShape shape = shape_of_project(
      args, kProjectThreads, ceil_div(kProjectBlocks * device.sm_count, head_tiles(args)));
  launch<project_kernel>("latent_attention_decode", shape, args.p.ctx, args);
}

// Whether one kernel is to do it all: a split a class at most, and what the blocks that share a
// head's elements read again is little.
bool is_small(const CombineArgs& args) {
  const int64_t parts = ceil_div(args.p.head_dim, kFoldWarps * kProjectElements);
  const int64_t row_bytes = args.partials.columns * static_cast<int64_t>(sizeof(float));
  return args.partials.splits <= kClasses && kProjectRows * row_bytes <= kSmallRowBytes &&
         query_rows(args.p, args.partials) * args.partials.splits * row_bytes * parts <=
             kSmallReadBytes;
}

void launch_fold_and_project(CombineArgs args) {
  args.by_chunks = Divisor::of(static_cast<int32_t>(ceil_div(args.partials.columns, 32 * 4)));
  LaunchShape shape = shape_of_project(args, kFoldThreads, args.p.head_dim);
  shape.shared_bytes = kProjectRows * args.partials.columns * sizeof(float);
  launch<fold_and_project_kernel>("latent_attention_decode", shape, args.p.ctx, args);
}

}  // namespace

int64_t folded_bytes(const LatentAttentionParams& p, const Partials& partials) {
  return query_rows(p, partials) * partials.columns * static_cast<int64_t>(sizeof(float));
}

void combine(const LatentAttentionParams& p, const Partials& partials, float* folded,
             const DeviceFacts& device) {
  CombineArgs args{};
  args.p = p;
  args.partials = partials;
  args.folded = folded;
  args.head_rows = static_cast<int32_t>(p.heads / p.kv_heads * p.q_len);
  args.by_group_rows = Divisor::of(partials.group_rows);
  args.by_groups = Divisor::of(static_cast<int32_t>(p.groups));
  args.by_q_len = Divisor::of(static_cast<int32_t>(p.q_len));
  args.by_row_tiles = Divisor::of(static_cast<int32_t>(ceil_div(args.head_rows, kProjectRows)));
  args.by_kv_heads = Divisor::of(static_cast<int32_t>(p.kv_heads));
  args.by_group_heads = Divisor::of(static_cast<int32_t>(p.kv_heads / p.groups));
  for (int64_t n = 0; n < p.v.count; ++n) {
    args.vector_a[n] = p.v.slices[n].rank % 4 == 0 && is_aligned(p.v.slices[n].a, 4);
  }
  if (is_small(args)) return launch_fold_and_project(args);
  const bool narrow = query_rows(p, partials) * ceil_div(partials.columns, kNarrowFold * 4) <=
                      kNarrowBlocks * device.sm_count;
  narrow ? launch_fold<kNarrowFold>(args) : launch_fold<kWideFold>(args);
  launch_project(args, device);
}

}  // namespace int8_ops::cuda::attention
