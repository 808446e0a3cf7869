#include "decode.h"

#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#include "../dispatch.h"
#include "combine.h"
#include "general.h"
#include "sm90_plan.h"

namespace int8_ops::cuda {
namespace {

using attention::Partials;

// Paths of the first half; the second is one for all.
enum class Path : int32_t { kGeneral, kSm90 };
constexpr const char* kPathNames[] = {"general", "sm90"};
constexpr const char* kPathVariable = "INT8_OPS_ATTENTION_PATH";

constexpr int64_t kAlign = 256;

// Offsets in bytes.
struct Workspace {
  Partials partials;
  int64_t sums = 0;
  int64_t stats = 0;
  int64_t folded = 0;
  int64_t bytes = 0;
};

int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

Workspace plan_workspace(const LatentAttentionParams& p) {
  Workspace w;
  Partials& partials = w.partials;
  constexpr int64_t kSplit = attention::kSplitTokens;
  partials.splits = static_cast<int32_t>((p.capacity + kSplit - 1) / kSplit);
  partials.group_rows = static_cast<int32_t>(p.heads / p.groups * p.q_len);
  for (int64_t n = 0; n < p.v.count; ++n) {
    partials.column_of[n] = partials.columns;
    partials.columns += static_cast<int32_t>(round_up(p.v.slices[n].rank, 4));
  }
  const int64_t rows = partials.index(p.batch * p.groups, 0, 0);
  const auto take = [&](int64_t bytes) {
    const int64_t at = w.bytes;
    w.bytes += round_up(bytes, kAlign);
    return at;
  };
  w.sums = take(rows * partials.columns * static_cast<int64_t>(sizeof(float)));
  w.stats = take(rows * static_cast<int64_t>(sizeof(float2)));
  w.folded = take(attention::folded_bytes(p, partials));
  return w;
}

Path path_named(const std::string& name) {
  std::string known;
  for (size_t i = 0; i < std::size(kPathNames); ++i) {
    if (name == kPathNames[i]) return static_cast<Path>(i);
    known += (i > 0 ? ", " : "") + std::string(kPathNames[i]);
  }
  throw std::runtime_error(std::string("int8_ops: ") + kPathVariable + " names the path \"" + name +
                           "\"; known are " + known);
}

// The variable is for tests and for measuring; read at each call, so that one process can try
// several.
Path path_for(const LatentAttentionParams& p) {
  const char* wish = std::getenv(kPathVariable);
  const bool forced = wish != nullptr && *wish != '\0';
  if (forced && path_named(wish) == Path::kGeneral) return Path::kGeneral;
  const std::string why = attention::why_not_sm90(p, device_facts(p.ctx));
  if (why.empty()) return Path::kSm90;
  if (!forced) return Path::kGeneral;
  throw std::runtime_error(std::string("int8_ops: ") + kPathVariable +
                           " names the path \"sm90\", but " + why);
}

}  // namespace

int64_t latent_attention_workspace_bytes(const LatentAttentionParams& p) {
  return plan_workspace(p).bytes;
}

void latent_attention(const LatentAttentionParams& p) {
  Workspace w = plan_workspace(p);
  auto* const base = static_cast<char*>(p.workspace);
  w.partials.sums = reinterpret_cast<float*>(base + w.sums);
  w.partials.stats = reinterpret_cast<float2*>(base + w.stats);
  const DeviceFacts& device = device_facts(p.ctx);
  switch (path_for(p)) {
    case Path::kGeneral:
      attention::general_attend(p, w.partials, device);
      break;
    case Path::kSm90:
      attention::sm90_attend(p, w.partials, device);
      break;
  }
  attention::combine(p, w.partials, reinterpret_cast<float*>(base + w.folded), device);
}

}  // namespace int8_ops::cuda
