// The only place that launches a kernel: shared-memory limit, stream, launch check.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>

#include "../common/params.h"

namespace int8_ops::cuda {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
};

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("int8_ops: ") + what +
                           " failed: " + cudaGetErrorString(status));
}

// A block gets more than this much dynamic shared memory only after the kernel's limit was raised.
inline constexpr size_t kDefaultSharedBytes = 48 * 1024;
inline constexpr int kMaxDevices = 64;

// Launches kKernel on the context's stream. The context's device is current: ops.cpp guards it.
template <auto kKernel, typename... Args>
void launch(const char* name, const LaunchShape& shape, const ExecContext& ctx, Args... args) {
  if (shape.shared_bytes > kDefaultSharedBytes) {
    // Raised once a kernel and device; two threads that race here set the same limit twice.
    static std::array<std::atomic<size_t>, kMaxDevices> raised_to{};
    auto& limit = raised_to.at(static_cast<size_t>(ctx.device_index));
    if (limit.load(std::memory_order_relaxed) < shape.shared_bytes) {
      check_cuda(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shape.shared_bytes)),
                 name);
      limit.store(shape.shared_bytes, std::memory_order_relaxed);
    }
  }
  kKernel<<<shape.grid, shape.block, shape.shared_bytes, static_cast<cudaStream_t>(ctx.stream)>>>(
      args...);
  check_cuda(cudaGetLastError(), name);
}

}  // namespace int8_ops::cuda
