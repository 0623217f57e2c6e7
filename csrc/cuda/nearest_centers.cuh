// A step of k-means: the nearest centre of each row, and the distance to it.
//
//   score_ik = |c_k|^2 / 2 - <x_i, c_k>,  label_i = argmin_k score_ik, of equal ones the first
//   distance_i = |x_i - c_label|^2, or for cosine 1 - <x_i, c_label> / |x_i|
#pragma once

#include "tiles.cuh"

namespace mcl {

constexpr int NEAREST_THREADS = 128;

template <class Operand>
struct NearestMemory {
  static constexpr int SIDE = Shape<Operand>::SIDE;
  ProductMemory<Operand> memory;
  int64_t rows[SIDE], centers[SIDE];  // of the tile, -1 behind the last
  int labels[SIDE];
  Sum<Operand> inverse_norms[SIDE];
};

// The lowest score so far. NaN is never lower: of scores that all are NaN or infinite it is centre 0.
template <class T>
struct Nearest {
  T score = INFINITY;
  int center = 0;

  __device__ __forceinline__ void meet(T other_score, int other) {
    if (other_score < score || (other_score == score && other < center)) score = other_score, center = other;
  }
};

// Takes the offset from what `load_part` has just written; each thread from what itself has.
template <int FEATURES, int THREADS, class Operand, int STRIDE>
__device__ __forceinline__ void subtract_offset(const Sum<Operand>* offset, int64_t first, int64_t width,
                                                Operand (*from)[STRIDE]) {
  constexpr int LANES = 16 / sizeof(Operand), VECTORS = FEATURES / LANES;
#pragma unroll
  for (int index = threadIdx.x; index < Shape<Operand>::SIDE * VECTORS; index += THREADS) {
    const int row = index / VECTORS, lane = index % VECTORS * LANES;
#pragma unroll
    for (int k = 0; k < LANES; k++)
      if (first + lane + k < width) from[row][lane + k] -= offset[first + lane + k];
  }
}

// A block owns SIDE rows, which meet all centres. 1 unit of products; of half precision 2, as a centre is the sum of two
// numbers of it: rows are multiplied as they are, and the offset is in the centres' norms.
template <class Operand>
__global__ void __launch_bounds__(NEAREST_THREADS, 1)
nearest_centers_kernel(const NearestProblem<Sum<Operand>> problem) {
  using T = Sum<Operand>;
  using S = Shape<Operand>;
  constexpr int TEAM = NEAREST_THREADS / S::SIDE;
  constexpr bool HALF = sizeof(Operand) == 2;
  auto& shared = shared_memory<NearestMemory<Operand>>();
  auto& parts = shared.memory.parts;
  const int of_tile = threadIdx.x / TEAM, of_team = threadIdx.x % TEAM;
  const int64_t row = int64_t(blockIdx.x) * S::SIDE + of_tile;
  if (of_team == 0) shared.rows[of_tile] = row < problem.n ? row : -1;

  Nearest<T> nearest;
  T squares = 0;
  for (int start = 0; start < problem.clusters; start += S::SIDE) {
    if (threadIdx.x < S::SIDE) {
      const int center = start + threadIdx.x;
      shared.centers[threadIdx.x] = center < problem.clusters ? center : -1;
    }
    __syncthreads();
    Products<Operand, S::SIDE, NEAREST_THREADS> products;
    products.clear();
    for (int64_t first = 0; first < problem.width; first += S::FEATURES) {
      load_part<S::FEATURES, NEAREST_THREADS>(problem.x, shared.rows, first, problem.width, parts.x);
      if constexpr (!HALF) subtract_offset<S::FEATURES, NEAREST_THREADS>(problem.offset, first, problem.width, parts.x);
#pragma unroll
      for (int number = 0; number < (HALF ? 2 : 1); number++) {
        load_part<S::FEATURES, NEAREST_THREADS>(problem.centers[number], shared.centers, first, problem.width, parts.y);
        __syncthreads();
        products.template add<S::FEATURES, Layout::rows_are_columns>(parts.x[0], S::STRIDE, parts.y[0], S::STRIDE);
        if (problem.cosine && start == 0 && number == 0)
          for (int feature = of_team; feature < S::FEATURES; feature += TEAM) {
            const T value = wide(parts.x[of_tile][feature]);
            squares += value * value;
          }
        __syncthreads();
      }
    }
    products.store(shared.memory.products[0], S::PRODUCT_STRIDE);
    __syncthreads();
    for (int column = of_team; column < S::SIDE && start + column < problem.clusters; column += TEAM)
      nearest.meet(problem.half_norms[start + column] - shared.memory.products[of_tile][column], start + column);
  }

#pragma unroll
  for (int lanes = 1; lanes < TEAM; lanes *= 2) {
    const T score = __shfl_xor_sync(0xffffffff, nearest.score, lanes);
    nearest.meet(score, __shfl_xor_sync(0xffffffff, nearest.center, lanes));
    squares += __shfl_xor_sync(0xffffffff, squares, lanes);
  }
  const T norm = sqrt(squares);
  const T inverse_norm = !problem.cosine ? T(1) : norm <= T(1e-12) ? T(0) : 1 / norm;
  if (of_team == 0) {
    shared.inverse_norms[of_tile] = inverse_norm;
    shared.labels[of_tile] = inverse_norm == 0 ? 0 : nearest.center;  // without a direction the first one
  }
  __syncthreads();

  // Each warp the distances of rows of its own, by differences: near a centre |x|^2 + |c|^2 - 2 <x, c> would not do.
  for (int at = threadIdx.x / WARP; at < S::SIDE; at += NEAREST_THREADS / WARP) {
    const int64_t place = shared.rows[at];
    if (place < 0) break;
    const int64_t label = shared.labels[at];
    const T inverse = shared.inverse_norms[at];
    T sum = 0;
    for (int64_t feature = threadIdx.x % WARP; feature < problem.width; feature += WARP) {
      const T value = read<T>(problem.x, place * problem.x.row_stride + feature * problem.x.step);
      const T center = problem.points[label * problem.width + feature];
      const T difference = value - problem.offset[feature] - center;
      sum += problem.cosine ? value * inverse * center : difference * difference;
    }
#pragma unroll
    for (int lanes = 1; lanes < WARP; lanes *= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
    if (threadIdx.x % WARP != 0) continue;
    const T distance = 1 - sum;
    problem.labels[place] = label;
    problem.distances[place] = !problem.cosine ? sum : distance < 0 ? T(0) : distance;  // NaN stays
    if (problem.cosine) problem.inverse_norms[place] = inverse;
  }
}

template <class Operand>
cudaError_t launch_nearest(const NearestProblem<Sum<Operand>>& problem, cudaStream_t stream) {
  if (problem.n == 0) return cudaSuccess;
  return launch<NearestMemory<Operand>>(nearest_centers_kernel<Operand>,
                                        (problem.n + Shape<Operand>::SIDE - 1) / Shape<Operand>::SIDE, NEAREST_THREADS,
                                        problem, stream);
}

}  // namespace mcl
