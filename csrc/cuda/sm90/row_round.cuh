// Some rows of x in a warp's registers: load them, find their scales, quantize them.
#pragma once

#include <cstdint>

#include "../ptx/rcp_approx.cuh"
#include "../quantize/row_math.cuh"

namespace int8_ops::cuda::sm90 {

// kPasses passes of 32 / kLanes rows; kLanes neighbouring lanes share a row of up to
// kLanes * kChunks * 8 values.
template <typename T, int kLanes, int kChunks, int kPasses>
struct RowRound {
  static constexpr int kRowsPerPass = 32 / kLanes;
  static constexpr int kRows = kPasses * kRowsPerPass;

  // Of each pass's row.
  struct Factors {
    float divisor[kPasses];  // NaN where the row is not finite
    float inverse[kPasses];  // about 1 / divisor, or 0 where the row becomes zeros
  };

  Chunk<T> chunks[kPasses][kChunks];

  static __device__ __forceinline__ int lane() { return threadIdx.x % kLanes; }
  // Of this thread's row of a pass, beyond the round's first.
  static __device__ __forceinline__ int32_t row_in_round(int pass) {
    return threadIdx.x % 32 / kLanes + pass * kRowsPerPass;
  }
  static __device__ __forceinline__ int32_t chunk_of(int i) { return i * kLanes + lane(); }

  // Rows first .. of x [.., k]; rows from `limit` on, and what lies beyond column `bound`, are
  // zeros.
  template <bool kCached>
  __device__ __forceinline__ void load(const T* x, int32_t first, int32_t limit, int32_t k,
                                       int32_t bound) {
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const int32_t row = first + row_in_round(p);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int32_t col = chunk_of(i) * kChunk;
        if (row >= limit || col >= bound) {
          chunks[p][i].clear();
        } else if constexpr (kCached) {
          chunks[p][i].load_cached(x + static_cast<int64_t>(row) * k + col);
        } else {
          chunks[p][i].load(x + static_cast<int64_t>(row) * k + col);
        }
      }
    }
  }

  // keep(row in round, scale) is called once a row, by one of its lanes.
  template <typename Keep>
  __device__ __forceinline__ Factors find_factors(Keep&& keep) const {
    float amax[kPasses];
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      typename Chunk<T>::Amax m = {};
#pragma unroll
      for (int i = 0; i < kChunks; ++i) chunks[p][i].add_to(m);
      amax[p] = Chunk<T>::amax_of(m);
    }
    return factors_of(amax, keep);
  }

  // From what each lane found of its rows.
  template <typename Keep>
  static __device__ __forceinline__ Factors factors_of(float (&amax)[kPasses], Keep&& keep) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        amax[p] = ptx::max_nan_f32(amax[p], __shfl_xor_sync(0xffffffffu, amax[p], offset));
      }
    }
    Factors f;
    float stored = 0.0F;
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const RowFactor one = RowFactor::from_amax(amax[p]);
      f.divisor[p] = one.divisor;
      f.inverse[p] = one.inverse;
      if (lane() == p) stored = one.stored;
    }
    static_assert(kPasses <= kLanes);
    if (lane() < kPasses) keep(row_in_round(lane()), stored);
    return f;
  }

  // Eight bytes a chunk go to place(row in round) + i * stride, which is this thread's place of
  // chunk i; null where the row is not wanted, and nothing goes beyond column `bound`.
  template <typename Place>
  __device__ __forceinline__ void quantize(const Factors& f, int32_t bound, int32_t stride,
                                           Place&& place) const {
    uint32_t doubts = 0;  // a bit a chunk, the last one lowest
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const RowBounds bounds = RowBounds::around(f.inverse[p]);
      const bool finite = f.divisor[p] <= kMaxFinite;
      int8_t* const to = place(row_in_round(p));
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        uint32_t doubt = finite ? 0 : 1;
        const uint2 q = quantize_chunk(chunks[p][i], bounds, doubt);
        const bool wanted = to != nullptr && chunk_of(i) * kChunk < bound;
        if (wanted) *reinterpret_cast<uint2*>(to + i * stride) = q;
        doubts = doubts * 2 + (wanted ? min(doubt, 1U) : 0);
      }
    }
    // One branch, so that all above is one block for the scheduler; and the code of one chunk, so
    // that little lies between what runs.
    if (__builtin_expect(doubts != 0, 0)) repair(doubts, f, stride, place);
  }

 private:
  template <typename Place>
  __device__ __forceinline__ void repair(uint32_t doubts, const Factors& f, int32_t stride,
                                         Place&& place) const {
#pragma unroll 1
    for (; doubts != 0; doubts &= doubts - 1) {
      const int index = kPasses * kChunks - __ffs(static_cast<int>(doubts));
      // Selected, not indexed: an index would put the chunks into local memory.
      Chunk<T> chunk = chunks[0][0];
      RowScale s;
      s.divisor = f.divisor[0];
#pragma unroll
      for (int other = 1; other < kPasses * kChunks; ++other) {
        if (index != other) continue;
        chunk = chunks[other / kChunks][other % kChunks];
        s.divisor = f.divisor[other / kChunks];
      }
      s.inverse = __frcp_rn(s.divisor);
      int8_t* const to = place(row_in_round(index / kChunks)) + index % kChunks * stride;
      *reinterpret_cast<uint2*>(to) =
          quantize_chunk_by_division(chunk, RowDivision::by(s), s.divisor <= kMaxFinite);
    }
  }
};

}  // namespace int8_ops::cuda::sm90
