// Exact sums of rows, which are the same in any order of the rows.
//
// An fp32 entry, at most 2^e in its column, is split into two integers: multiples of 2^(e - 22) and of 2^(e - 35), or
// of a coarser power if the sum over all rows would not fit the 53 bits of fp64. They are added as integers, with one
// fp64 addition per sum, since many GPUs are slow in fp64. fp64 entries are rounded so that fp64 adds them exactly.
#pragma once

#include "kmeans_problem.h"
#include "tiles.cuh"

namespace mcl {

constexpr int SUM_THREADS = 128;
constexpr int LOW_PER_HIGH = 1 << 13;  // value of 1 in the high integer, in multiples of the low one

// Reads an element. Rows are of any type if they are multiplied in fp64.
template <class Operand>
__device__ __forceinline__ Sum<Operand> value_at(const Matrix& x, int64_t row, int64_t feature) {
  const int64_t at = row * x.row_stride + feature * x.step;
  if constexpr (std::is_same_v<Operand, double>)
    return read<double>(x, at);
  else
    return wide(static_cast<const Operand*>(x.data)[at]);
}

// The entry of a row as it is summed. Its product is not fused with a sum, so that it has the same bits in every
// kernel.
template <class Operand>
__device__ __forceinline__ Sum<Operand> entry_at(const Samples<Sum<Operand>>& samples, int64_t row, int64_t feature,
                                                 Sum<Operand> inverse_norm) {
  const Sum<Operand> value = value_at<Operand>(samples.x, row, feature);
  return samples.inverse_norms ? multiply_rounded(value, inverse_norm) : value - samples.offset[feature];
}

// The sum of entry(0) .. entry(count - 1) of one column: up to 511 high integers of 2^22 fit an int.
template <class T, class Entry>
__device__ __forceinline__ double exact_sum(const FixedPoint<T>& column, int64_t feature, int count, Entry entry) {
  const T rounding = column.rounding[feature];
  if constexpr (std::is_same_v<T, double>) {
    double sum = 0;
#pragma unroll 4
    for (int i = 0; i < count; i++) sum += (entry(i) + rounding) - rounding;
    return sum;
  } else {
    const float factor = column.factor[feature];
    int high = 0, low = 0;
#pragma unroll 4
    for (int i = 0; i < count; i++) {
      const float scaled = entry(i) * factor, integer = rintf(scaled);
      high += int(integer);
      low += int(((scaled - integer) * LOW_PER_HIGH + rounding) - rounding);
    }
    return (double(high) * LOW_PER_HIGH + low) * column.step[feature];
  }
}

// A warp sums WARP features of a piece.
template <class Operand>
__global__ void __launch_bounds__(SUM_THREADS) sum_pieces_kernel(const PieceProblem<Sum<Operand>> problem) {
  using T = Sum<Operand>;
  const Samples<T>& samples = problem.samples;
  const int64_t chunks = (samples.width + WARP - 1) / WARP;
  const int64_t item = (int64_t(blockIdx.x) * SUM_THREADS + threadIdx.x) / WARP;
  const int64_t piece = item / chunks, feature = item % chunks * WARP + threadIdx.x % WARP;
  if (piece >= problem.pieces || feature >= samples.width) return;
  const int64_t begin = problem.begin[piece], end = problem.end[piece];
  problem.sums[piece * samples.width + feature] =
      exact_sum<T>(problem.entries, feature, begin < end ? int(end - begin) : 0, [&](int i) {
        const int64_t row = problem.order[begin + i];
        return entry_at<Operand>(samples, row, feature, samples.inverse_norms ? samples.inverse_norms[row] : T(0));
      });
}

// A thread sums a feature of a cluster.
__global__ void __launch_bounds__(SUM_THREADS) join_pieces_kernel(const JoinProblem problem) {
  const int64_t index = int64_t(blockIdx.x) * SUM_THREADS + threadIdx.x;
  if (index >= problem.clusters * problem.width) return;
  const int64_t cluster = index / problem.width, feature = index % problem.width, end = problem.end[cluster];
  double sum = 0;
#pragma unroll 4
  for (int64_t piece = problem.begin[cluster]; piece < end; piece++)
    sum += problem.pieces[piece * problem.width + feature];
  problem.sums[index] = sum;
}

template <class Operand>
cudaError_t launch_sum_pieces(const PieceProblem<Sum<Operand>>& problem, cudaStream_t stream) {
  constexpr int WARPS = SUM_THREADS / WARP;
  const int64_t items = problem.pieces * ((problem.samples.width + WARP - 1) / WARP);
  if (items == 0) return cudaSuccess;
  return launch<NoMemory>(sum_pieces_kernel<Operand>, (items + WARPS - 1) / WARPS, SUM_THREADS, problem, stream);
}

inline cudaError_t launch_join_pieces(const JoinProblem& problem, cudaStream_t stream) {
  const int64_t sums = problem.clusters * problem.width;
  if (sums == 0) return cudaSuccess;
  return launch<NoMemory>(join_pieces_kernel, (sums + SUM_THREADS - 1) / SUM_THREADS, SUM_THREADS, problem, stream);
}

}  // namespace mcl
