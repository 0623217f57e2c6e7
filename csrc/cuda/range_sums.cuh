// Sums of ranges of rows: of those of a cluster by pieces, and of a cluster's pieces.
#pragma once

#include "tiles.cuh"

namespace mcl {

constexpr int SUM_FEATURES = 32, SUM_ROWS = 8;  // of a block: a thread for each

struct SumMemory {
  double sums[SUM_ROWS][SUM_FEATURES];
};

// A block owns a range and SUM_FEATURES of its features. What it sums are multiples of one number, of which fp64 rounds
// no sum: the same bits in any order.
template <class T>
__global__ void __launch_bounds__(SUM_FEATURES * SUM_ROWS) range_sums_kernel(const SumProblem<T> problem) {
  auto& shared = shared_memory<SumMemory>();
  const int64_t parts = (problem.width + SUM_FEATURES - 1) / SUM_FEATURES;
  const int64_t range = blockIdx.x / parts;
  const int lane = threadIdx.x % SUM_FEATURES, of_rows = threadIdx.x / SUM_FEATURES;
  const int64_t feature = blockIdx.x % parts * SUM_FEATURES + lane;
  const bool valid = feature < problem.width;

  double total = 0;
  if (valid) {
    const T offset = problem.offset ? problem.offset[feature] : T(0);
    const double rounding = problem.rounding ? problem.rounding[feature] : 0;
    const int64_t end = problem.end[range];
    for (int64_t at = problem.begin[range] + of_rows; at < end; at += SUM_ROWS) {
      const int64_t row = problem.order ? problem.order[at] : at;
      T value = read<T>(problem.x, row * problem.x.row_stride + feature * problem.x.step);
      if (problem.inverse_norms) value = multiply_rounded(value, problem.inverse_norms[row]);
      total += (double(value - offset) + rounding) - rounding;
    }
  }
  shared.sums[of_rows][lane] = total;
  __syncthreads();
  if (of_rows > 0 || !valid) return;
#pragma unroll
  for (int other = 1; other < SUM_ROWS; other++) total += shared.sums[other][lane];
  problem.sums[range * problem.width + feature] = total;
}

template <class T>
cudaError_t launch_sums(const SumProblem<T>& problem, cudaStream_t stream) {
  const int64_t parts = (problem.width + SUM_FEATURES - 1) / SUM_FEATURES;
  if (problem.ranges == 0) return cudaSuccess;
  return launch<SumMemory>(range_sums_kernel<T>, problem.ranges * parts, SUM_FEATURES * SUM_ROWS, problem, stream);
}

}  // namespace mcl
