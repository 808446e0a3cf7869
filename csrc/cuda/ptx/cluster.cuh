// Blocks of a cluster, groups of warps, and their registers, sm_90.
#pragma once

#include <cstdint>

namespace int8_ops::ptx {

// PTX ISA, "Special Registers: %cluster_ctarank".
__device__ __forceinline__ uint32_t cluster_block_rank() {
  uint32_t rank = 0;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// PTX ISA, "Special Registers: %cluster_nctarank".
__device__ __forceinline__ uint32_t cluster_blocks() {
  uint32_t blocks = 0;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}

// What lies at `shared` of this block, in block `rank` of the cluster.
// PTX ISA: mapa.
__device__ __forceinline__ uint32_t shared_of_block(uint32_t shared, uint32_t rank) {
  uint32_t remote = 0;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(rank));
  return remote;
}

// All threads of all blocks of the cluster meet; their writes to shared memory are visible after.
// PTX ISA: barrier.cluster.arrive, barrier.cluster.wait.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// The same in two steps, for what was written to barriers alone (after fence_mbarrier_init()): a
// release of everything else would wait for it. PTX ISA: barrier.cluster.arrive.relaxed.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
// PTX ISA: barrier.cluster.wait.
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Barrier `id` among `threads` threads of the block; 0 is __syncthreads()'s.
// PTX ISA: bar.sync.
__device__ __forceinline__ void named_barrier_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts as a thread that came to the barrier, without waiting.
// PTX ISA: bar.arrive.
__device__ __forceinline__ void named_barrier_arrive(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The registers of each thread of this warpgroup become kCount, taken from, or given to, the
// block's pool. PTX ISA: setmaxnreg, sm_90a.
template <uint32_t kCount>
__device__ __forceinline__ void set_max_registers_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <uint32_t kCount>
__device__ __forceinline__ void set_max_registers_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace int8_ops::ptx
