// Some rows of x in a warp's registers: load them, find their scales, quantize them.
#pragma once

#include <cstdint>

#include "../ptx/rcp_approx.cuh"
#include "../quantize/row_math.cuh"

namespace int8_ops::cuda::sm90 {

// kPasses passes of 32 / kLanes rows; kLanes neighbouring lanes share a row of up to
// kLanes * kChunks * 8 values. kRedux: the largest value of a warp's row is found by one
// instruction, which is less code than shuffles; it counts where code runs once.
template <typename T, int kLanes, int kChunks, int kPasses, bool kRedux = false>
struct RowRound {
  static_assert(!kRedux || kLanes == 32, "redux meets all lanes of a warp");
  static constexpr int kRowLanes = kLanes;
  static constexpr int kChunkCount = kChunks;
  static constexpr int kPassCount = kPasses;
  static constexpr int kRowsPerPass = 32 / kLanes;
  static constexpr int kRows = kPasses * kRowsPerPass;

  // Of each pass's row.
  struct Factors {
    float amax[kPasses];
    float inverse[kPasses];  // RowFactor's
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

  // keep(row in round, scale) is called once a row, by one of its lanes; found() by all, when the
  // rows have arrived.
  template <typename Keep>
  __device__ __forceinline__ Factors find_factors(Keep&& keep) const {
    return find_factors(keep, [] {});
  }
  template <typename Keep, typename Found>
  __device__ __forceinline__ Factors find_factors(Keep&& keep, Found&& found) const {
    typename Chunk<T>::Amax m[kPasses];
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      m[p] = {};
#pragma unroll
      for (int i = 0; i < kChunks; ++i) chunks[p][i].add_to(m[p]);
    }
    return factors_of(m, keep, found);
  }

  // From what each lane found of its rows.
  template <typename Keep>
  static __device__ __forceinline__ Factors factors_of(typename Chunk<T>::Amax (&m)[kPasses],
                                                       Keep&& keep) {
    return factors_of(m, keep, [] {});
  }
  template <typename Keep, typename Found>
  static __device__ __forceinline__ Factors factors_of(typename Chunk<T>::Amax (&m)[kPasses],
                                                       Keep&& keep, Found&& found) {
    Factors f;
    reduce(m, f.amax);
    found();
    // One lane finds the factor of a pass for all.
    const RowFactor one = RowFactor::from_amax<T>(of_lane(f.amax));
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      f.inverse[p] = kPasses == 1 ? one.inverse : __shfl_sync(0xffffffffu, one.inverse, p, kLanes);
    }
    static_assert(kPasses <= kLanes);
    if (lane() < kPasses) keep(row_in_round(lane()), one.stored);
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
      int8_t* const to = place(row_in_round(p));
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        uint32_t doubt = 0;
        const uint2 q = quantize_chunk(chunks[p][i], f.inverse[p], doubt);
        const bool wanted = to != nullptr && chunk_of(i) * kChunk < bound;
        if (wanted) *reinterpret_cast<uint2*>(to + i * stride) = q;
        doubts = doubts * 2 + (wanted ? min(doubt, 1U) : 0);
      }
    }
    // One branch, so that all above is one block for the scheduler; and the code of one chunk, so
    // that little lies between what runs.
    if (__builtin_expect(doubts != 0, 0)) {
#pragma unroll 1
      for (; doubts != 0; doubts &= doubts - 1) {
        const int index = index_of(doubts);
        int8_t* const to = place(row_in_round(index / kChunks)) + index % kChunks * stride;
        *reinterpret_cast<uint2*>(to) = by_division(index, f);
      }
    }
  }

  // The same, kept in registers, for 16-bit values; what is beyond the row is zeros. Returns a bit
  // a pass whose row must be divided instead.
  __device__ __forceinline__ uint32_t quantize(const Factors& f,
                                               uint2 (&q)[kPasses][kChunks]) const {
    static_assert(kOneProduct<T>);
    uint32_t to_divide = 0;
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      uint32_t doubt = 0;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        q[p][i] = quantize_chunk(chunks[p][i], f.inverse[p], doubt);
      }
      to_divide |= doubt << p;
    }
    return to_divide;
  }

 private:
  // values[lane() % kPasses]: selected bit by bit, since the compiler makes an index of a chain of
  // comparisons, and so puts the values into local memory.
  static __device__ __forceinline__ float of_lane(const float (&values)[kPasses]) {
    static_assert((kPasses & (kPasses - 1)) == 0);
    float left[kPasses];
#pragma unroll
    for (int p = 0; p < kPasses; ++p) left[p] = values[p];
#pragma unroll
    for (int bit = 1; bit < kPasses; bit *= 2) {
#pragma unroll
      for (int p = 0; p < kPasses; p += 2 * bit) {
        left[p] = (lane() & bit) != 0 ? left[p + bit] : left[p];
      }
    }
    return left[0];
  }

  // amax over the lanes of a row. Rows of 16 bits go two to a word.
  static __device__ __forceinline__ void reduce(typename Chunk<T>::Amax (&m)[kPasses],
                                                float (&amax)[kPasses]) {
    if constexpr (kRedux && kOneProduct<T>) {
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        m[p] = __vmaxu2(m[p], m[p] >> 16) & 0xffffu;
        amax[p] = Chunk<T>::amax_of_bits(__reduce_max_sync(0xffffffffu, m[p]));
      }
    } else if constexpr (kRedux) {
      // Not negative, or NaN: ordered as integers.
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        const uint32_t bits = __float_as_uint(Chunk<T>::amax_of(m[p]));
        amax[p] = __uint_as_float(__reduce_max_sync(0xffffffffu, bits));
      }
    } else if constexpr (kOneProduct<T>) {
#pragma unroll
      for (int p = 0; p < kPasses; ++p) m[p] = __vmaxu2(m[p], m[p] >> 16) & 0xffffu;
#pragma unroll
      for (int p = 0; p + 1 < kPasses; p += 2) m[p] |= m[p + 1] << 16;
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
#pragma unroll
        for (int p = 0; p < kPasses; p += 2) {
          m[p] = __vmaxu2(m[p], __shfl_xor_sync(0xffffffffu, m[p], offset));
        }
      }
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        amax[p] = Chunk<T>::amax_of_bits(p % 2 == 0 ? m[p] & 0xffffu : m[p - 1] >> 16);
      }
    } else {
#pragma unroll
      for (int p = 0; p < kPasses; ++p) amax[p] = Chunk<T>::amax_of(m[p]);
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
#pragma unroll
        for (int p = 0; p < kPasses; ++p) {
          amax[p] = ptx::max_nan_f32(amax[p], __shfl_xor_sync(0xffffffffu, amax[p], offset));
        }
      }
    }
  }

  // Of the chunk that the lowest bit of `doubts` stands for.
  static __device__ __forceinline__ int index_of(uint32_t doubts) {
    return kPasses * kChunks - __ffs(static_cast<int>(doubts));
  }

  __device__ __forceinline__ uint2 by_division(int index, const Factors& f) const {
    // Selected, not indexed: an index would put the chunks into local memory.
    Chunk<T> chunk = chunks[0][0];
    float amax = f.amax[0];
#pragma unroll
    for (int other = 1; other < kPasses * kChunks; ++other) {
      if (index != other) continue;
      chunk = chunks[other / kChunks][other % kChunks];
      amax = f.amax[other / kChunks];
    }
    return quantize_chunk_by_division(chunk, RowFactor::from_amax<T>(amax));
  }
};

}  // namespace int8_ops::cuda::sm90
