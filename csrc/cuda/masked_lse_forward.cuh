// lse_i = log sum_j exp(s_ij) by a running maximum and sum, or how many products are above a threshold.
#pragma once

#include "tiles.cuh"

namespace mcl {

constexpr int FORWARD_THREADS = 128;

template <class Operand>
struct ForwardMemory {
  ProductMemory<Operand> memory;
  Places<Shape<Operand>::SIDE> at;
  int of_warps[FORWARD_THREADS / WARP];
};

// The sum of exponentials as total * exp(maximum).
template <class T>
struct RunningSum {
  T maximum = -INFINITY, total = 0;

  // Makes room for terms up to `larger`, and returns what is subtracted from them.
  __device__ __forceinline__ T raise(T larger) {
    const T shift = finite_or_zero(larger);
    total *= exp(maximum - shift);
    maximum = larger;
    return shift;
  }

  __device__ __forceinline__ T logsumexp() const { return finite_or_zero(maximum) + log(total); }
};

// A block owns SIDE sorted rows. 1 unit of products.
template <class Operand>
__global__ void __launch_bounds__(FORWARD_THREADS, 1)
masked_lse_forward_kernel(const ForwardProblem<Sum<Operand>> problem) {
  using T = Sum<Operand>;
  constexpr int SIDE = Shape<Operand>::SIDE, TEAM = FORWARD_THREADS / SIDE;
  auto& shared = shared_memory<ForwardMemory<Operand>>();
  const Pairs<T>& pairs = problem.pairs;
  const bool compares_ids = pairs.rows.ids != nullptr;
  const Row row = load_row(pairs.rows, int(blockIdx.x) * SIDE + threadIdx.x / TEAM);
  if (threadIdx.x % TEAM == 0) shared.at.rows[threadIdx.x / TEAM] = row.place;
  const T scale = row.place < 0 ? T(0) : pairs.scale[row.place * pairs.scale_stride];
  const Span span = find_span<SIDE, FORWARD_THREADS>(row, pairs.skips_tiles, shared.of_warps);

  RunningSum<T> sum;
  for (int start = span.tile_at(span.first); start < span.last; start = span.tile_at(start + SIDE)) {
    load_columns(pairs.columns, start, span.last, shared.at);
    __syncthreads();
    multiply_tile<Operand, FORWARD_THREADS>(pairs, shared.at, shared.memory);
    T larger = sum.maximum;
    for_each_product<Operand, TEAM>(row, start, compares_ids, shared.at, shared.memory, [&](int, T product, bool kept) {
      if (kept) larger = fmax(larger, multiply_rounded(product, scale));
    });
    const T shift = sum.raise(larger);
    for_each_product<Operand, TEAM>(row, start, compares_ids, shared.at, shared.memory, [&](int, T product, bool kept) {
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
  if (row.place >= 0 && threadIdx.x % TEAM == 0) problem.lse[row.place] = sum.logsumexp();
}

// As above: count_i = how many kept columns have not <x_i, y_j> <= threshold_i.
template <class Operand>
__global__ void __launch_bounds__(FORWARD_THREADS, 1) count_above_kernel(const ForwardProblem<Sum<Operand>> problem) {
  using T = Sum<Operand>;
  constexpr int SIDE = Shape<Operand>::SIDE, TEAM = FORWARD_THREADS / SIDE;
  auto& shared = shared_memory<ForwardMemory<Operand>>();
  const Pairs<T>& pairs = problem.pairs;
  const bool compares_ids = pairs.rows.ids != nullptr;
  const Row row = load_row(pairs.rows, int(blockIdx.x) * SIDE + threadIdx.x / TEAM);
  if (threadIdx.x % TEAM == 0) shared.at.rows[threadIdx.x / TEAM] = row.place;
  const T threshold = row.place < 0 ? T(0) : problem.threshold[row.place];
  const Span span = find_span<SIDE, FORWARD_THREADS>(row, pairs.skips_tiles, shared.of_warps);

  int count = 0;
  for (int start = span.tile_at(span.first); start < span.last; start = span.tile_at(start + SIDE)) {
    load_columns(pairs.columns, start, span.last, shared.at);
    __syncthreads();
    multiply_tile<Operand, FORWARD_THREADS>(pairs, shared.at, shared.memory);
    for_each_product<Operand, TEAM>(row, start, compares_ids, shared.at, shared.memory, [&](int, T product, bool kept) {
      if (kept && !(product <= threshold)) count++;
    });
    __syncthreads();
  }
#pragma unroll
  for (int lanes = 1; lanes < TEAM; lanes *= 2) count += __shfl_xor_sync(0xffffffff, count, lanes);
  if (row.place >= 0 && threadIdx.x % TEAM == 0) problem.count[row.place] = count;
}

template <class Operand>
cudaError_t launch_forward(const ForwardProblem<Sum<Operand>>& problem, cudaStream_t stream) {
  const int n = problem.pairs.rows.n;
  if (n == 0) return cudaSuccess;
  return launch<ForwardMemory<Operand>>(
      problem.lse ? masked_lse_forward_kernel<Operand> : count_above_kernel<Operand>,
      (int64_t(n) + Shape<Operand>::SIDE - 1) / Shape<Operand>::SIDE, FORWARD_THREADS, problem, stream);
}

}  // namespace mcl
