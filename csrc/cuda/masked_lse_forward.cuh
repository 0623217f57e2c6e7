// lse_i = log sum_j exp(s_ij) by a running maximum and sum, or the number of products above a threshold.
#pragma once

#include "work_list.cuh"

namespace mcl {

constexpr int FORWARD_THREADS = 128;

template <class Operand>
struct ForwardMemory {
  ProductMemory<Operand> memory;
  TileIndices<Shape<Operand>::EDGE> indices;
};

// A sum of exponentials, stored as total * exp(maximum).
template <class T>
struct LogSumExp {
  T maximum = -INFINITY, total = 0;

  // The factor of a row's products.
  static __device__ __forceinline__ T setting(const ForwardProblem<T>& problem, int64_t row) {
    return problem.pairs.scale[row * problem.pairs.scale_stride];
  }

  // Raises the maximum to `larger`. Returns the shift to subtract from the exponents of the next terms.
  __device__ __forceinline__ T raise(T larger) {
    const T shift = finite_or_zero(larger);
    total *= exp(maximum - shift);
    maximum = larger;
    return shift;
  }

  // Adds the products of a tile that `for_each` visits.
  template <class ForEach>
  __device__ __forceinline__ void add_products(T scale, ForEach for_each) {
    T larger = maximum;
    for_each([&](int, T product, bool kept) {
      if (kept) larger = fmax(larger, multiply_rounded(product, scale));
    });
    const T shift = raise(larger);
    for_each([&](int, T product, bool kept) {
      if (kept) total += exp(multiply_rounded(product, scale) - shift);
    });
  }

  __device__ __forceinline__ void add(LogSumExp other) {
    const T larger = fmax(maximum, other.maximum);
    raise(larger);
    other.raise(larger);
    total += other.total;
  }

  __device__ __forceinline__ LogSumExp of_lane_xor(int lanes) const {
    return {__shfl_xor_sync(0xffffffff, maximum, lanes), __shfl_xor_sync(0xffffffff, total, lanes)};
  }

  __device__ __forceinline__ void write(const ForwardProblem<T>& problem, int64_t row) const {
    problem.lse[row] = finite_or_zero(maximum) + log(total);
  }
};

// The number of kept columns with not (<x_i, y_j> <= threshold_i), so that NaN counts.
template <class T>
struct CountAbove {
  int count = 0;

  static __device__ __forceinline__ T setting(const ForwardProblem<T>& problem, int64_t row) {
    return problem.threshold[row];
  }

  template <class ForEach>
  __device__ __forceinline__ void add_products(T threshold, ForEach for_each) {
    for_each([&](int, T product, bool kept) {
      if (kept && !(product <= threshold)) count++;
    });
  }

  __device__ __forceinline__ void add(const CountAbove& other) { count += other.count; }

  __device__ __forceinline__ CountAbove of_lane_xor(int lanes) const {
    return {__shfl_xor_sync(0xffffffff, count, lanes)};
  }

  __device__ __forceinline__ void write(const ForwardProblem<T>& problem, int64_t row) const {
    problem.count[row] = count;
  }
};

// Does the units of a program. Cost of all: the products of all pairs once.
template <class Operand, class Result>
__device__ __forceinline__ void compare_rows(const ForwardProblem<Sum<Operand>>& problem) {
  using T = Sum<Operand>;
  constexpr int EDGE = Shape<Operand>::EDGE, TEAM = FORWARD_THREADS / EDGE;
  auto& shared = shared_memory<ForwardMemory<Operand>>();
  const Pairs<T>& pairs = problem.pairs;
  const bool compares_ids = pairs.rows.ids != nullptr;
  const int tile_row = threadIdx.x / TEAM;
  const bool leads = threadIdx.x % TEAM == 0;  // the first of the threads that share a row
  Program<EDGE> program(problem.work, blockIdx.x);
  for (Stretch stretch; program.next(stretch);) {
    const Row row = load_row(pairs.rows, stretch.row_tile * EDGE + tile_row);
    if (leads) shared.indices.rows[tile_row] = row.original;
    const T setting = row.original < 0 ? T(0) : Result::setting(problem, row.original);

    Result result;
    for (int start = stretch.first; start < stretch.last; start = stretch.tile_at(start + EDGE)) {
      load_columns(pairs.columns, start, stretch.last, shared.indices);
      __syncthreads();
      multiply_tile<Operand, FORWARD_THREADS>(pairs, shared.indices, shared.memory);
      result.add_products(setting, [&](auto visit) {
        for_each_product<Operand, TEAM>(row, start, compares_ids, shared.indices, shared.memory, visit);
      });
      __syncthreads();
    }
#pragma unroll
    for (int lanes = 1; lanes < TEAM; lanes *= 2) result.add(result.of_lane_xor(lanes));
    if (row.original < 0 || !leads) continue;
    if (stretch.slot < 0)
      result.write(problem, row.original);
    else
      static_cast<Result*>(problem.partials)[stretch.slot * EDGE + tile_row] = result;
  }
}

template <class Operand>
__global__ void __launch_bounds__(FORWARD_THREADS, 1)
masked_lse_forward_kernel(const ForwardProblem<Sum<Operand>> problem) {
  compare_rows<Operand, LogSumExp<Sum<Operand>>>(problem);
}

template <class Operand>
__global__ void __launch_bounds__(FORWARD_THREADS, 1) count_above_kernel(const ForwardProblem<Sum<Operand>> problem) {
  compare_rows<Operand, CountAbove<Sum<Operand>>>(problem);
}

// Adds the parts of the row tile that a block is for, a row for each warp.
template <class T, class Result>
__device__ __forceinline__ void join_rows(const ForwardProblem<T>& problem) {
  constexpr int EDGE = Shape<T>::EDGE, WARPS = JOIN_THREADS / WARP, BLOCKS = EDGE / WARPS;
  const int tile_row = blockIdx.x % BLOCKS * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
  Cut cut;
  if (!find_cut(problem.work, 1 + blockIdx.x / BLOCKS, cut)) return;
  const int sorted = cut.row_tile * EDGE + tile_row;
  if (sorted >= problem.pairs.rows.n) return;
  const Result* partials = static_cast<const Result*>(problem.partials) + tile_row;
  Result result;
  if (lane == 0) result = partials[cut.first_slot * EDGE];
  for (int program = cut.second + lane; program < cut.past; program += WARP)
    result.add(partials[2 * program * EDGE]);
#pragma unroll
  for (int lanes = 1; lanes < WARP; lanes *= 2) result.add(result.of_lane_xor(lanes));
  if (lane == 0) result.write(problem, problem.pairs.rows.order[sorted]);
}

template <class T>
__global__ void __launch_bounds__(JOIN_THREADS) join_lse_kernel(const ForwardProblem<T> problem) {
  join_rows<T, LogSumExp<T>>(problem);
}

template <class T>
__global__ void __launch_bounds__(JOIN_THREADS) join_counts_kernel(const ForwardProblem<T> problem) {
  join_rows<T, CountAbove<T>>(problem);
}

template <class Operand>
cudaError_t launch_forward(ForwardProblem<Sum<Operand>> problem, int64_t programs, const Allocate& allocate,
                           cudaStream_t stream) {
  using T = Sum<Operand>;
  using Memory = ForwardMemory<Operand>;
  constexpr int EDGE = Shape<Operand>::EDGE;
  static_assert(EDGE == Shape<T>::EDGE);
  if (problem.pairs.rows.n == 0) return cudaSuccess;
  const auto kernel = problem.lse ? masked_lse_forward_kernel<Operand> : count_above_kernel<Operand>;
  const int64_t slot = EDGE * (problem.lse ? sizeof(LogSumExp<T>) : sizeof(CountAbove<T>));
  cudaError_t error = list_work<Memory, EDGE>(kernel, problem, FORWARD_THREADS, 1, slot, programs, allocate, stream);
  if (error != cudaSuccess) return error;
  const int blocks = problem.work.programs;
  if (blocks > 1) problem.partials = allocate(2 * slot * blocks);
  error = launch<Memory>(kernel, blocks, FORWARD_THREADS, problem, stream);
  if (error != cudaSuccess || blocks == 1) return error;
  return launch<NoMemory>(problem.lse ? join_lse_kernel<T> : join_counts_kernel<T>,
                          int64_t(blocks - 1) * EDGE / (JOIN_THREADS / WARP), JOIN_THREADS, problem, stream);
}

}  // namespace mcl
