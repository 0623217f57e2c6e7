// Finds the columns that each row drops because their value equals its own, by bisection.
#pragma once

#include "plan_problem.h"
#include "tiles.cuh"

namespace mcl {

constexpr int DROP_THREADS = 128;

__global__ void __launch_bounds__(DROP_THREADS) find_dropped_kernel(const DropProblem problem) {
  const int64_t sorted = int64_t(blockIdx.x) * DROP_THREADS + threadIdx.x;
  if (sorted >= problem.n) return;
  const int64_t value = problem.row_values[problem.row_order[sorted]];
  const int begin = int(problem.row_begin[sorted]), end = int(problem.row_end[sorted]);
  const auto value_at = [&](int column) { return problem.column_values[problem.column_order[column]]; };
  const int first = first_where(begin, end, [&](int column) { return value_at(column) >= value; });
  problem.drop_begin[sorted] = first;
  problem.drop_end[sorted] = first_where(first, end, [&](int column) { return value_at(column) > value; });
}

inline cudaError_t launch_find_dropped(const DropProblem& problem, cudaStream_t stream) {
  if (problem.n == 0) return cudaSuccess;
  return launch<NoMemory>(find_dropped_kernel, (int64_t(problem.n) + DROP_THREADS - 1) / DROP_THREADS, DROP_THREADS,
                          problem, stream);
}

}  // namespace mcl
