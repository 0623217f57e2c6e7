// lse_i = log sum_j exp(s_ij) by a running maximum and sum, or the number of products above a threshold.
#pragma once

#include "tiles.cuh"

namespace mcl {

constexpr int FORWARD_THREADS = 128;

template <class Operand>
struct ForwardMemory {
  ProductMemory<Operand> memory;
  TileIndices<Shape<Operand>::EDGE> indices;
  int warp_maxima[FORWARD_THREADS / WARP];
};

// A sum of exponentials, stored as total * exp(maximum).
template <class T>
struct RunningSum {
  T maximum = -INFINITY, total = 0;

  // Raises the maximum to `larger`. Returns the shift to subtract from the exponents of the next terms.
  __device__ __forceinline__ T raise(T larger) {
    const T shift = finite_or_zero(larger);
    total *= exp(maximum - shift);
    maximum = larger;
    return shift;
  }

  __device__ __forceinline__ T logsumexp() const { return finite_or_zero(maximum) + log(total); }
};

// A block owns EDGE sorted rows. Cost: the products of all pairs once.
template <class Operand>
__global__ void __launch_bounds__(FORWARD_THREADS, 1)
masked_lse_forward_kernel(const ForwardProblem<Sum<Operand>> problem) {
  using T = Sum<Operand>;
  constexpr int EDGE = Shape<Operand>::EDGE, TEAM = FORWARD_THREADS / EDGE;
  auto& shared = shared_memory<ForwardMemory<Operand>>();
  const Pairs<T>& pairs = problem.pairs;
  const bool compares_ids = pairs.rows.ids != nullptr;
  const Row row = load_row(pairs.rows, int(blockIdx.x) * EDGE + threadIdx.x / TEAM);
  if (threadIdx.x % TEAM == 0) shared.indices.rows[threadIdx.x / TEAM] = row.original;
  const T scale = row.original < 0 ? T(0) : pairs.scale[row.original * pairs.scale_stride];
  const Span span = find_span<EDGE, FORWARD_THREADS>(row, pairs.skips_tiles, shared.warp_maxima);

  RunningSum<T> sum;
  for (int start = span.tile_at(span.first); start < span.last; start = span.tile_at(start + EDGE)) {
    load_columns(pairs.columns, start, span.last, shared.indices);
    __syncthreads();
    multiply_tile<Operand, FORWARD_THREADS>(pairs, shared.indices, shared.memory);
    T larger = sum.maximum;
    const auto for_each = [&](auto visit) {
      for_each_product<Operand, TEAM>(row, start, compares_ids, shared.indices, shared.memory, visit);
    };
    for_each([&](int, T product, bool kept) {
      if (kept) larger = fmax(larger, multiply_rounded(product, scale));
    });
    const T shift = sum.raise(larger);
    for_each([&](int, T product, bool kept) {
      if (kept) sum.total += exp(multiply_rounded(product, scale) - shift);
    });
    __syncthreads();
  }
#pragma unroll
  for (int lanes = 1; lanes < TEAM; lanes *= 2) {
    RunningSum<T> other{__shfl_xor_sync(0xffffffff, sum.maximum, lanes),
                        __shfl_xor_sync(0xffffffff, sum.total, lanes)};
    const T larger = fmax(sum.maximum, other.maximum);
    sum.raise(larger);
    other.raise(larger);
    sum.total += other.total;
  }
  if (row.original >= 0 && threadIdx.x % TEAM == 0) problem.lse[row.original] = sum.logsumexp();
}

// With the same schedule, count_i = number of kept columns with not (<x_i, y_j> <= threshold_i), so that NaN counts.
template <class Operand>
__global__ void __launch_bounds__(FORWARD_THREADS, 1) count_above_kernel(const ForwardProblem<Sum<Operand>> problem) {
  using T = Sum<Operand>;
  constexpr int EDGE = Shape<Operand>::EDGE, TEAM = FORWARD_THREADS / EDGE;
  auto& shared = shared_memory<ForwardMemory<Operand>>();
  const Pairs<T>& pairs = problem.pairs;
  const bool compares_ids = pairs.rows.ids != nullptr;
  const Row row = load_row(pairs.rows, int(blockIdx.x) * EDGE + threadIdx.x / TEAM);
  if (threadIdx.x % TEAM == 0) shared.indices.rows[threadIdx.x / TEAM] = row.original;
  const T threshold = row.original < 0 ? T(0) : problem.threshold[row.original];
  const Span span = find_span<EDGE, FORWARD_THREADS>(row, pairs.skips_tiles, shared.warp_maxima);

  int count = 0;
  for (int start = span.tile_at(span.first); start < span.last; start = span.tile_at(start + EDGE)) {
    load_columns(pairs.columns, start, span.last, shared.indices);
    __syncthreads();
    multiply_tile<Operand, FORWARD_THREADS>(pairs, shared.indices, shared.memory);
    for_each_product<Operand, TEAM>(row, start, compares_ids, shared.indices, shared.memory,
                                    [&](int, T product, bool kept) {
                                      if (kept && !(product <= threshold)) count++;
                                    });
    __syncthreads();
  }
#pragma unroll
  for (int lanes = 1; lanes < TEAM; lanes *= 2) count += __shfl_xor_sync(0xffffffff, count, lanes);
  if (row.original >= 0 && threadIdx.x % TEAM == 0) problem.count[row.original] = count;
}

template <class Operand>
cudaError_t launch_forward(const ForwardProblem<Sum<Operand>>& problem, cudaStream_t stream) {
  const int n = problem.pairs.rows.n;
  if (n == 0) return cudaSuccess;
  return launch<ForwardMemory<Operand>>(
      problem.lse ? masked_lse_forward_kernel<Operand> : count_above_kernel<Operand>,
      (int64_t(n) + Shape<Operand>::EDGE - 1) / Shape<Operand>::EDGE, FORWARD_THREADS, problem, stream);
}

}  // namespace mcl
