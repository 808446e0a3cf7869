// The bulk copy engine (TMA), sm_90.
// PTX ISA, "Data Movement and Conversion Instructions: cp.async.bulk".
#pragma once

#include <cuda.h>

#include <cstdint>

namespace int8_ops::ptx {

// PTX ISA: prefetch.tensormap.
__device__ __forceinline__ void prefetch_tensormap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A two-dimensional box to shared memory; its bytes complete on the barrier.
// PTX ISA: cp.async.bulk.tensor.2d.
__device__ __forceinline__ void tma_load_2d(uint32_t shared, const CUtensorMap* map,
                                            uint32_t barrier, int32_t c0, int32_t c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
}

// A box of four dimensions.
// PTX ISA: cp.async.bulk.tensor.4d.
__device__ __forceinline__ void tma_load_4d(uint32_t shared, const CUtensorMap* map,
                                            uint32_t barrier, int32_t c0, int32_t c1, int32_t c2,
                                            int32_t c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// The same box to L2 alone.
// PTX ISA: cp.async.bulk.prefetch.tensor.4d.
__device__ __forceinline__ void tma_prefetch_4d(const CUtensorMap* map, int32_t c0, int32_t c1,
                                                int32_t c2, int32_t c3) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(map),
               "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

// The same box to the same address in every block of the cluster that `blocks` has a bit for, and
// its bytes to each one's barrier.
// PTX ISA: cp.async.bulk.tensor.2d with .multicast::cluster.
__device__ __forceinline__ void tma_load_2d_multicast(uint32_t shared, const CUtensorMap* map,
                                                      uint32_t barrier, uint16_t blocks, int32_t c0,
                                                      int32_t c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared),
      "l"(map), "r"(barrier), "h"(blocks), "r"(c0), "r"(c1)
      : "memory");
}

// A box from shared memory to a matrix, clipped at its edges, as part of the thread's bulk group.
// PTX ISA: cp.async.bulk.tensor.2d.global.shared::cta.
__device__ __forceinline__ void tma_store_2d(const CUtensorMap* map, uint32_t shared, int32_t c0,
                                             int32_t c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(shared), "r"(c0), "r"(c1)
      : "memory");
}

// PTX ISA: cp.async.bulk.commit_group.
__device__ __forceinline__ void bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until the sources of all but the newest kPending of this thread's bulk groups were read.
// PTX ISA: cp.async.bulk.wait_group.read.
template <int kPending>
__device__ __forceinline__ void bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Contiguous bytes to shared memory, completing on the barrier; addresses and size are multiples of
// 16. PTX ISA: cp.async.bulk.shared::cluster.global.
__device__ __forceinline__ void bulk_load(uint32_t shared, const void* global, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}

// The same bytes to the same address in every block of the cluster that `blocks` has a bit for, and
// to each one's barrier.
// PTX ISA: cp.async.bulk.shared::cluster.global with .multicast::cluster.
__device__ __forceinline__ void bulk_load_multicast(uint32_t shared, const void* global,
                                                    uint32_t bytes, uint32_t barrier,
                                                    uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1], %2, [%3], %4;" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier), "h"(blocks)
      : "memory");
}

// Contiguous bytes of this block's shared memory to a block of the cluster, completing on a barrier
// there; both addresses there are shared_of_block()'s. Multiples of 16.
// PTX ISA: cp.async.bulk.shared::cluster.shared::cta.
__device__ __forceinline__ void bulk_copy_to_block(uint32_t remote, uint32_t shared, uint32_t bytes,
                                                   uint32_t remote_barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(remote),
      "r"(shared), "r"(bytes), "r"(remote_barrier)
      : "memory");
}

// Fetches so many bytes into L2; the address and the size are multiples of 16.
// PTX ISA: cp.async.bulk.prefetch.L2.
__device__ __forceinline__ void prefetch_l2_bulk(const void* global, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

// Orders ordinary accesses to shared memory before those of the copy engine and of wgmma.
// PTX ISA: fence.proxy.async.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for accesses to any memory.
// PTX ISA: fence.proxy.async.
__device__ __forceinline__ void fence_proxy_async_all() {
  asm volatile("fence.proxy.async;" ::: "memory");
}

}  // namespace int8_ops::ptx
