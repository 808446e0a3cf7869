// The pipeline between the copy engine and the warpgroups: stages of shared memory, filled and
// freed in turn.
#pragma once

#include <cstdint>

#include "../ptx/mbarrier.cuh"

namespace int8_ops::cuda::sm90 {

// Barriers of up to kCount stages. full: one arrival (the producer's, which announces the bytes)
// and the bytes; empty: one arrival a reading warp.
template <int kCount>
struct StageBarriers {
  alignas(8) uint64_t full[kCount];
  alignas(8) uint64_t empty[kCount];
};

// Of slots that one thread fills and every reading thread frees: what tells of their filling is
// another barrier.
template <int kCount>
struct SlotBarriers {
  alignas(8) uint64_t empty[kCount];
};

// A place in the ring: the stage, and the parity of the phase that its next use waits for.
struct RingPlace {
  uint32_t stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next(uint32_t stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Addresses of the barriers in shared memory. Waiting for "empty" with the opposite parity passes
// at once in the first round: a fresh barrier counts as having finished the phase before.
struct RingBarriers {
  uint32_t full;
  uint32_t empty;

  __device__ __forceinline__ uint32_t full_at(const RingPlace& p) const {
    return full + p.stage * 8;
  }
  __device__ __forceinline__ uint32_t empty_at(const RingPlace& p) const {
    return empty + p.stage * 8;
  }
  __device__ __forceinline__ void wait_full(const RingPlace& p) const {
    ptx::mbarrier_wait_parity(full_at(p), p.parity);
  }
  __device__ __forceinline__ void wait_empty(const RingPlace& p) const {
    ptx::mbarrier_wait_parity(empty_at(p), p.parity ^ 1);
  }
};

}  // namespace int8_ops::cuda::sm90
