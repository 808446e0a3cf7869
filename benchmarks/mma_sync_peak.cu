// What mma.sync can reach on int8: products alone, operands in registers, the fragment pattern of a
// 64 x 64 warp tile on random bits. It bounds csrc/cuda/sm80 from above.
//
//   nvcc -std=c++20 -O3 -arch=native -o mma_sync_peak benchmarks/mma_sync_peak.cu
#include <cuda_runtime.h>

#include <cstdio>

#include "../csrc/cuda/ptx/mma_s8.cuh"

constexpr int kMTiles = 4;
constexpr int kNTiles = 8;

__global__ void __launch_bounds__(256, 1) multiply(int* out, int rounds) {
  int acc[kMTiles][kNTiles][4] = {};
  unsigned a[2][kMTiles][4];
  unsigned b[2][kNTiles][2];
  unsigned bits = threadIdx.x * 2654435761u + blockIdx.x;
  const auto random = [&] { return bits = bits * 1664525u + 1013904223u; };
  for (int step = 0; step < 2; ++step) {
    for (auto& tile : a[step]) {
      for (unsigned& word : tile) word = random();
    }
    for (auto& tile : b[step]) {
      for (unsigned& word : tile) word = random();
    }
  }
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kNTiles; ++j) {
          int8_ops::ptx::mma_m16n8k32_s8(acc[i][j], a[step][i], b[step][j][0], b[step][j][1]);
        }
      }
    }
  }
  int sum = 0;
  for (auto& row : acc) {
    for (auto& tile : row) {
      for (const int word : tile) sum += word;
    }
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;  // so that nothing is optimised away
}

int main() {
  cudaDeviceProp device{};
  cudaGetDeviceProperties(&device, 0);
  int* out = nullptr;
  cudaMalloc(&out, sizeof(int) * 256 * device.multiProcessorCount);
  cudaEvent_t start;
  cudaEvent_t end;
  cudaEventCreate(&start);
  cudaEventCreate(&end);
  constexpr int kRounds = 20000;
  for (const int threads : {128, 256}) {
    multiply<<<device.multiProcessorCount, threads>>>(out, 100);
    cudaEventRecord(start);
    multiply<<<device.multiProcessorCount, threads>>>(out, kRounds);
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    float ms = 0;
    cudaEventElapsedTime(&ms, start, end);
    const double warps = device.multiProcessorCount * threads / 32.0;
    const double operations = warps * kRounds * 2 * kMTiles * kNTiles * (2.0 * 16 * 8 * 32);
    std::printf("%s, %d threads a multiprocessor: %.0f TOPS (%s)\n", device.name, threads,
                operations / ms / 1e9, cudaGetErrorString(cudaGetLastError()));
  }
}
