// The only place that launches a kernel: shared-memory limit, stream, launch check.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>

#include "../common/params.h"

namespace int8_ops::cuda {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks along x
};

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("int8_ops: ") + what +
                           " failed: " + cudaGetErrorString(status));
}

// A block gets more than this much dynamic shared memory only after the kernel's limit was raised.
inline constexpr size_t kDefaultSharedBytes = 48 * 1024;
inline constexpr int kMaxDevices = 64;

inline int32_t checked_int32(int64_t value, const char* what) {
  if (value > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error("int8_ops: " + std::to_string(value) + " " + what +
                             " are beyond the 2^31 - 1 that a CUDA kernel here can index");
  }
  return static_cast<int32_t>(value);
}

// Note [Dependent launch]
// On sm_90 and up a kernel is launched so that its blocks may become resident while the kernel
// before it drains: the launch latency is then hidden. Every kernel here begins with
// ptx::grid_dependency_wait(), before it touches memory (but for lengths that an earlier kernel of
// the same op has read: Note [Lengths first] in attention/combine_args.cuh), and every thread of it
// executes that, so that a finished kernel implies that all kernels before it are finished. Blocks
// let the successor in with ptx::grid_dependency_trigger() when they have little left to do, or by
// ending. Not earlier: blocks that arrive while the multiprocessors are unevenly busy pile up on
// the idle ones and stay there (measured: a grid of 128 blocks then takes twice its time). A grid
// of few blocks that take the same time lets its successor in when its rows have arrived
// (sm90/panel.cuh).
//
// Code compiled for less than sm_90 does not wait, on whatever device its PTX ends up: what counts
// is what the kernel was compiled from.
struct KernelFacts {
  std::atomic<bool> known{false};
  std::atomic<bool> waits_for_predecessor{false};
  std::atomic<size_t> shared_limit{kDefaultSharedBytes};
};

// Raises the kernel's limit of shared memory where the launch needs more.
template <auto kKernel>
void allow_shared_bytes(const char* name, KernelFacts& facts, size_t bytes) {
  if (facts.shared_limit.load(std::memory_order_acquire) >= bytes) return;
  // The limit is set, not raised: of two threads with different sizes the larger must win.
  static std::mutex setting;
  const std::lock_guard<std::mutex> lock(setting);
  if (facts.shared_limit.load(std::memory_order_relaxed) >= bytes) return;
  check_cuda(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)),
             name);
  facts.shared_limit.store(bytes, std::memory_order_release);
}

// Asked for once a kernel and device; two threads that race here learn and set the same.
template <auto kKernel>
KernelFacts& kernel_facts(const char* name, const ExecContext& ctx) {
  static std::array<KernelFacts, kMaxDevices> all_facts;
  KernelFacts& facts = all_facts.at(static_cast<size_t>(ctx.device_index));
  if (!facts.known.load(std::memory_order_acquire)) {
    cudaFuncAttributes attributes{};
    check_cuda(cudaFuncGetAttributes(&attributes, kKernel), name);
    facts.waits_for_predecessor.store(attributes.ptxVersion >= 90, std::memory_order_relaxed);
    facts.known.store(true, std::memory_order_release);
  }
  return facts;
}

// How many clusters of the kernel run at once on an idle device. A block takes a multiprocessor to
// itself, so only the cluster's size (at most eight) matters, not how much shared memory it asks.
template <auto kKernel>
int32_t max_active_clusters(const char* name, const LaunchShape& shape, const ExecContext& ctx) {
  static std::array<std::array<std::atomic<int32_t>, 9>, kMaxDevices> all_counts;
  std::atomic<int32_t>& count =
      all_counts.at(static_cast<size_t>(ctx.device_index)).at(shape.cluster);
  if (count.load(std::memory_order_relaxed) == 0) {
    allow_shared_bytes<kKernel>(name, kernel_facts<kKernel>(name, ctx), shape.shared_bytes);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(shape.cluster);
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kKernel, &config), name);
    count.store(std::max(clusters, 1), std::memory_order_relaxed);
  }
  return count.load(std::memory_order_relaxed);
}

// Launches kKernel on the context's stream. The context's device is current: ops.cpp guards it.
template <auto kKernel, typename... Args>
void launch(const char* name, const LaunchShape& shape, const ExecContext& ctx, Args... args) {
  KernelFacts& facts = kernel_facts<kKernel>(name, ctx);
  allow_shared_bytes<kKernel>(name, facts, shape.shared_bytes);
  std::array<cudaLaunchAttribute, 2> attributes{};
  unsigned count = 0;
  if (facts.waits_for_predecessor.load(std::memory_order_relaxed)) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = shape.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(ctx.stream);
  config.attrs = attributes.data();
  config.numAttrs = count;
  check_cuda(cudaLaunchKernelEx(&config, kKernel, args...), name);
}

}  // namespace int8_ops::cuda
