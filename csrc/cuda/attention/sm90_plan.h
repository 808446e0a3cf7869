// The Hopper path of latent_attention_decode: what it serves, and how it divides a block's shared
// memory. Host code but for the constants.
#pragma once

#include <cuda.h>
#include <vector_types.h>

#include <cstdint>
#include <string>

#include "../heuristics/gemm_heuristics.h"
#include "divisor.h"
#include "partials.h"

namespace int8_ops::cuda::attention {

// A tile is 128 tokens, half of it a warpgroup's; keys are multiplied in steps of 64 channels, 32
// RoPE pairs, and latents come in boxes of 64 tokens by 128 bytes.
inline constexpr int32_t kTileTokens = 128;
inline constexpr int32_t kTilesPerSplit = kSplitTokens / kTileTokens;
inline constexpr int32_t kBoxTokens = 64;
inline constexpr int32_t kBoxWidth = 128;
inline constexpr int32_t kBoxBytes = kBoxTokens * kBoxWidth;
inline constexpr int32_t kStepChannels = 64;
inline constexpr int32_t kMaxChunks = 4;  // of 128 values of the keys' latent, in registers
// Query rows of a block, in fours: what the second product's 16 rows hold.
inline constexpr int32_t kMaxQuads = 4;
// And those of one head: four chunks of latents leave few registers for their scores.
constexpr int32_t max_quads(int64_t head_dim, int32_t chunks) {
  if (chunks < kMaxChunks) return kMaxQuads;
  return head_dim > 64 ? 1 : 2;
}
inline constexpr int32_t kQueryBuffers = 2;
inline constexpr int32_t kTasks = 6;         // on their way through the block
inline constexpr int32_t kMaxPairs = 64;     // of a head
inline constexpr int32_t kHeadBytes = 5120;  // of shared memory: barriers, and scratch
// Sums of up to 512 products of int8 and the turn of a pair stay below float16's 65504.
inline constexpr int32_t kKeyExponent = 8;
inline constexpr float kKeyFactor = 1.0F / (1 << kKeyExponent);
// int4 values are used in the upper half of a byte.
inline constexpr float kPackedFactor = 1.0F / 16;
// Of a quad's turned queries, an operand of eight rows and a step's channels.
inline constexpr int32_t kQueryStepBytes = 8 * kStepChannels * 2;
inline constexpr int32_t kMaxRingSlots = 16;
inline constexpr int32_t kBlockRows = 4 * kMaxQuads;
// Weights of a box's tokens, [rows][tokens] of float16; of a slice of values for a split's boxes.
inline constexpr int32_t kBoxWeightBytes = kBlockRows * kBoxTokens * 2;
inline constexpr int32_t kWeightBytes = kSplitTokens / kBoxTokens * kBoxWeightBytes;
inline constexpr int32_t kAttendThreads = 640;

// Where what lies in a block's shared memory: bytes from its start, where A is.
struct AttendShared {
  int32_t k_slots = 0;  // boxes of keys' latents, of each warpgroup; 0: it does not fit
  int32_t v_slots = 0;
  uint32_t k_ring = 0;   // [2][k_slots] boxes
  uint32_t v_ring = 0;   // [v_slots] boxes
  uint32_t scores = 0;   // float [2][rows][128]
  uint32_t weights = 0;  // float16 [slices of values][4 boxes][16][64], swizzled
  uint32_t scaled = 0;   // queries, float16 [slices of keys][16][head_dim], by fragments
  uint32_t queries = 0;  // turned, [2][heads][quads][steps] operands, swizzled
  uint32_t head = 0;     // barriers and scratch
  uint32_t bytes = 0;
};

// What it is like to give a block's lane so many heads: see Block::choose_work().
struct LaneChoice {
  int32_t lanes = 0;
  Divisor sharing;        // blocks that share a lane's splits
  Divisor group_lanes;    // of a group
  int32_t lane_step = 0;  // from a block's lane to its next one
  int32_t turns = 0;      // that a block takes lanes, where there are more of them than blocks
  int32_t first = 0;      // cycles until a first split is done
  int32_t next = 0;       // and from one to the next
};

struct AttendPlan {
  int32_t chunks = 0;             // of A, of all slices of keys
  int32_t max_chunks = 0;         // of a slice
  int32_t heads = 0;              // KV heads whose A a block can hold
  int32_t quads = 0;              // of query rows a head and block
  int32_t row_blocks = 0;         // blocks of query rows a head
  LaneChoice choices[kMaxQuads];  // of 1 .. heads
  AttendShared shared;
};

struct AttendArgs {
  LatentAttentionParams p;
  Partials partials;
  AttendPlan plan;
  int32_t group_heads = 0;
  int32_t repeats = 0;
  Divisor by_quads;
  Divisor by_q_len;
  Divisor by_row_blocks;
  int32_t head_rows = 0;              // query rows a KV head: repeats * q_len
  int32_t k_chunks[kMaxSlices] = {};  // of A: of 128 values
  CUtensorMap k_maps[kMaxSlices];
  CUtensorMap v_maps[kMaxSlices];
  CUtensorMap a_maps[kMaxSlices];
};

// Chunks of 128 values of a slice; of a packed one the low halves' and the high ones' apart.
constexpr int32_t chunks_of(const LatentSlice& s) {
  return (width_of(s) + kBoxWidth - 1) / kBoxWidth * (s.packed ? 2 : 1);
}

// Of a value's latent, the bytes that are summed up at once: there are registers for 128 values.
INT8_OPS_HOST_DEVICE constexpr int32_t value_columns(bool packed) {
  return packed ? kBoxWidth / 2 : kBoxWidth;
}

// Empty where the path serves the problem, else why not. Asks for nothing that differs between
// the rows of a batch or with the number of new tokens.
std::string why_not_sm90(const LatentAttentionParams& p, const DeviceFacts& device);

// First half of the op on Hopper; why_not_sm90() is empty.
void sm90_attend(const LatentAttentionParams& p, const Partials& partials,
                 const DeviceFacts& device);

}  // namespace int8_ops::cuda::attention
