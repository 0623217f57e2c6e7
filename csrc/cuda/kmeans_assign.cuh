// The nearest centre of each row, the distance to it, and with few centres the sums of their rows.
//
//   euclidean  label_i = argmin_k |x_i - c_k|^2,  distance_i = |x_i - c_label|^2
//   cosine     label_i = argmax_k <x_i, c_k>,     distance_i = 1 - <x_i, c_label>,    x_i divided by its norm
#pragma once

#include "kmeans_sums.cuh"

namespace mcl {

constexpr int MOST_SUMMED = 32;  // centres whose rows are summed in the same pass

// Rows of half precision meet centres in two parts, each of the rows' own type.
template <class Operand>
struct AssignShape {
  static constexpr int SIDE = Shape<Operand>::SIDE, THREADS = 256, TEAM = THREADS / SIDE, WARPS = THREADS / WARP;
  static constexpr int PARTS = sizeof(Operand) == 2 ? 2 : 1;
};

template <class Operand>
struct RowsAndCenters {
  alignas(32) Operand rows[Shape<Operand>::SIDE][Shape<Operand>::STRIDE];
  alignas(32) Operand centers[AssignShape<Operand>::PARTS][Shape<Operand>::SIDE][Shape<Operand>::STRIDE];
};

template <class Operand>
struct AssignMemory {
  static constexpr int SIDE = Shape<Operand>::SIDE;
  union {
    RowsAndCenters<Operand> factors;
    alignas(32) Sum<Operand> products[SIDE][Shape<Operand>::PRODUCT_STRIDE];
  };
  int64_t rows[SIDE], centers[SIDE];  // of the tile; -1 behind the last
  int labels[SIDE];                   // K behind the last row, and of an undecided one
  Sum<Operand> lowest[SIDE], second[SIDE];
  Sum<Operand> inverse_norms[SIDE];
  int order[SIDE];                    // the tile's rows by cluster,
  int begin[MOST_SUMMED + 1];         // and where each cluster's begin among them
};

// <x_i, c_k> of the tile into shared memory, which every thread may read when this returns.
template <class Operand>
__device__ __forceinline__ void multiply_centers(const AssignProblem<Sum<Operand>>& problem,
                                                 AssignMemory<Operand>& shared) {
  using S = Shape<Operand>;
  constexpr int THREADS = AssignShape<Operand>::THREADS, PARTS = AssignShape<Operand>::PARTS;
  const int64_t width = problem.samples.width;
  auto& factors = shared.factors;
  Products<Operand, S::SIDE, THREADS> products;
  products.clear();
  for (int64_t first = 0; first < width; first += S::FEATURES) {
    load_part<S::FEATURES, THREADS>(problem.samples.x, shared.rows, first, width, factors.rows, problem.samples.offset);
    load_part<S::FEATURES, THREADS>(problem.high, shared.centers, first, width, factors.centers[0]);
    if constexpr (PARTS == 2)
      load_part<S::FEATURES, THREADS>(problem.low, shared.centers, first, width, factors.centers[1]);
    __syncthreads();
#pragma unroll
    for (int part = 0; part < PARTS; part++)
      products.template add<S::FEATURES, Layout::rows_are_columns>(factors.rows[0], S::STRIDE,
                                                                   factors.centers[part][0], S::STRIDE);
    __syncthreads();
  }
  products.store(shared.products[0], S::PRODUCT_STRIDE);
  __syncthreads();
}

// The two lowest scores of those of two threads.
template <class T>
__device__ __forceinline__ void take_lowest(T other, T second_of_other, T& lowest, T& second) {
  second = min(min(second, second_of_other), max(lowest, other));
  lowest = min(lowest, other);
}

// Labels of the tile's rows and their two lowest scores, a row by the TEAM threads that share it: of equal scores the
// first. None is behind the last centre; a row whose scores are all NaN has the label 0.
template <class Operand>
__device__ __forceinline__ void find_nearest(const AssignProblem<Sum<Operand>>& problem, int64_t first_row,
                                             AssignMemory<Operand>& shared) {
  using T = Sum<Operand>;
  constexpr int SIDE = Shape<Operand>::SIDE, TEAM = AssignShape<Operand>::TEAM, LANES = 4;
  const int of_tile = threadIdx.x / TEAM, member = threadIdx.x % TEAM;
  if (threadIdx.x < SIDE) {
    const int64_t row = first_row + threadIdx.x;
    shared.rows[threadIdx.x] = row < problem.samples.n ? row : -1;
  }
  T lowest = INFINITY, second = INFINITY;
  int label = 0;
  for (int start = 0; start < problem.clusters; start += SIDE) {
    if (threadIdx.x < SIDE) {
      const int center = start + int(threadIdx.x);
      shared.centers[threadIdx.x] = center < problem.clusters ? center : -1;
    }
    __syncthreads();
    multiply_centers(problem, shared);
    for (int first = member * LANES; first < SIDE; first += TEAM * LANES) {
      const auto products = load<LANES>(&shared.products[of_tile][first]);
#pragma unroll
      for (int k = 0; k < LANES; k++) {
        const int center = start + first + k;
        if (center >= problem.clusters) break;
        const T score = problem.half_norms[center] - products.lanes[k];
        if (score < lowest) label = center;
        take_lowest(score, T(INFINITY), lowest, second);
      }
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < TEAM; lanes *= 2) {
    const T other = __shfl_xor_sync(0xffffffff, lowest, lanes);
    const T second_of_other = __shfl_xor_sync(0xffffffff, second, lanes);
    const int label_of_other = __shfl_xor_sync(0xffffffff, label, lanes);
    if (other < lowest || (other == lowest && label_of_other < label)) label = label_of_other;
    take_lowest(other, second_of_other, lowest, second);
  }
  if (member > 0) return;
  shared.labels[of_tile] = first_row + of_tile < problem.samples.n ? label : problem.clusters;
  shared.lowest[of_tile] = lowest;
  shared.second[of_tile] = second;
}

template <class T>
__device__ __forceinline__ T sum_of_warp(T value) {
#pragma unroll
  for (int lanes = 1; lanes < WARP; lanes *= 2) value += __shfl_xor_sync(0xffffffff, value, lanes);
  return value;
}

// Whether rounding could not give a row, by its second lowest score and the sum of the squares that are multiplied,
// another label: `score_limits` of gpu_pass.py.
template <class T>
__device__ __forceinline__ bool is_decided(const AssignProblem<T>& problem, T lowest, T second, T squares) {
  const T* limits = problem.limits;
  const T above = limits[0] * squares + limits[1];
  T bound = limits[2] + limits[3] * sqrt(above);
  if (!problem.samples.inverse_norms) bound = min(bound, limits[4] * above + limits[5] * second);
  return second - lowest > bound + limits[6] + limits[7] * above;
}

// The distance of each row to its centre from differences, a warp for a row, which the cache still has; and whether its
// label is decided. Of cosine that of a row whose squares leave the range of fp32 is not, nor of one without direction.
template <class Operand>
__device__ __forceinline__ void measure(const AssignProblem<Sum<Operand>>& problem, int64_t first_row,
                                        AssignMemory<Operand>& shared) {
  using T = Sum<Operand>;
  using S = AssignShape<Operand>;
  const Samples<T>& samples = problem.samples;
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const bool is_relative = samples.offset && !problem.half;  // what was multiplied
  for (int of_tile = warp; of_tile < S::SIDE; of_tile += S::WARPS) {
    const int64_t row = first_row + of_tile;
    if (row >= samples.n) break;
    const int label = shared.labels[of_tile];
    const T* center = problem.centers + label * samples.width;
    T distance = 0, squares = 0, factor = 1;
#pragma unroll 4
    for (int64_t feature = lane; feature < samples.width; feature += WARP) {
      const T value = value_at<Operand>(samples.x, row, feature);
      const T multiplied = is_relative ? value - samples.offset[feature] : value;
      squares += multiplied * multiplied;
    }
    squares = sum_of_warp(squares);
    bool decided = is_decided(problem, shared.lowest[of_tile], shared.second[of_tile], squares);
    if (samples.inverse_norms) {
      decided = decided && squares > T(1e-30) && squares < T(1e30);
      factor = decided ? 1 / sqrt(squares) : T(0);
    }
#pragma unroll 4
    for (int64_t feature = lane; feature < samples.width; feature += WARP) {
      const T difference = value_at<Operand>(samples.x, row, feature) * factor - center[feature];
      distance += difference * difference;
    }
    distance = sum_of_warp(distance);
    if (lane > 0) continue;
    problem.labels[row] = label;
    problem.distances[row] = samples.inverse_norms ? distance / 2 : distance;
    problem.undecided[row] = !decided;
    if (samples.inverse_norms) samples.inverse_norms[row] = factor;
    shared.labels[of_tile] = decided ? label : problem.clusters;
    shared.inverse_norms[of_tile] = factor;
  }
}

// Adds the tile's rows to the block's sums, a warp WARP features of a cluster; returns how many rows are of the
// thread's cluster, the number of the thread.
template <class Operand>
__device__ __forceinline__ int add_to_sums(const AssignProblem<Sum<Operand>>& problem, int64_t first_row,
                                           AssignMemory<Operand>& shared) {
  using T = Sum<Operand>;
  using S = AssignShape<Operand>;
  if (threadIdx.x < S::SIDE) {
    const int label = shared.labels[threadIdx.x];
    int before = 0;
    for (int row = 0; row < S::SIDE; row++)
      before += shared.labels[row] < label || (shared.labels[row] == label && row < int(threadIdx.x));
    shared.order[before] = threadIdx.x;
  }
  if (int(threadIdx.x) <= problem.clusters) {
    int before = 0;
    for (int row = 0; row < S::SIDE; row++) before += shared.labels[row] < int(threadIdx.x);
    shared.begin[threadIdx.x] = before;
  }
  __syncthreads();
  const Samples<T>& samples = problem.samples;
  const int chunks = int((samples.width + WARP - 1) / WARP);
  for (int item = threadIdx.x / WARP; item < problem.clusters * chunks; item += S::WARPS) {
    const int cluster = item / chunks, begin = shared.begin[cluster], count = shared.begin[cluster + 1] - begin;
    const int64_t feature = item % chunks * WARP + threadIdx.x % WARP;
    if (count == 0 || feature >= samples.width) continue;
    problem.sums[(int64_t(blockIdx.x) * problem.clusters + cluster) * samples.width + feature] +=
        exact_sum<T>(problem.entries, feature, count, [&](int i) {
          const int of_tile = shared.order[begin + i];
          return entry_at<Operand>(samples, first_row + of_tile, feature, shared.inverse_norms[of_tile]);
        });
  }
  const bool counts = int(threadIdx.x) < problem.clusters;
  return counts ? shared.begin[threadIdx.x + 1] - shared.begin[threadIdx.x] : 0;
}

// A block owns tiles of SIDE rows, each `blocks` behind the one before. What a tile writes, no thread reads any more
// when the next one's labels are found: there are barriers between.
template <class Operand>
__global__ void __launch_bounds__(AssignShape<Operand>::THREADS, 2)
assign_clusters_kernel(const AssignProblem<Sum<Operand>> problem) {
  constexpr int SIDE = Shape<Operand>::SIDE;
  auto& shared = shared_memory<AssignMemory<Operand>>();
  int64_t count = 0;
  for (int64_t first_row = int64_t(blockIdx.x) * SIDE; first_row < problem.samples.n;
       first_row += int64_t(problem.blocks) * SIDE) {
    find_nearest(problem, first_row, shared);
    __syncthreads();
    measure(problem, first_row, shared);
    if (!problem.sums) continue;
    __syncthreads();
    count += add_to_sums(problem, first_row, shared);
  }
  if (problem.sums && int(threadIdx.x) < problem.clusters)
    problem.counts[int64_t(blockIdx.x) * problem.clusters + threadIdx.x] = count;
}

template <class Operand>
cudaError_t launch_assign(AssignProblem<Sum<Operand>> problem, cudaStream_t stream) {
  using S = AssignShape<Operand>;
  if (problem.sums && problem.clusters > MOST_SUMMED) return cudaErrorInvalidConfiguration;
  if (!problem.sums) problem.blocks = int((problem.samples.n + S::SIDE - 1) / S::SIDE);
  if (problem.blocks == 0) return cudaSuccess;
  return launch<AssignMemory<Operand>>(assign_clusters_kernel<Operand>, problem.blocks, S::THREADS, problem, stream);
}

}  // namespace mcl
