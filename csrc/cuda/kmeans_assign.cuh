// Finds the nearest centre of each row and the distance to it, and with few centres sums the rows of each.
//
//   euclidean  label_i = argmin_k |x_i - c_k|^2,  distance_i = |x_i - c_label|^2
//   cosine     label_i = argmax_k <x_i, c_k>,     distance_i = 1 - <x_i, c_label>,    x_i divided by its norm
#pragma once

#include "kmeans_sums.cuh"

namespace mcl {

constexpr int MAX_SUMMED = 32;  // centres whose rows are summed in the same pass

// Half-precision rows are multiplied by each centre in two parts of the rows' type.
template <class Operand>
struct AssignShape {
  static constexpr int EDGE = Shape<Operand>::EDGE, THREADS = 256, TEAM = THREADS / EDGE, WARPS = THREADS / WARP;
  static constexpr int PARTS = sizeof(Operand) == 2 ? 2 : 1;
};

template <class Operand>
struct RowsAndCenters {
  alignas(32) Operand rows[Shape<Operand>::EDGE][Shape<Operand>::STRIDE];
  alignas(32) Operand centers[AssignShape<Operand>::PARTS][Shape<Operand>::EDGE][Shape<Operand>::STRIDE];
};

// The nearest centres of a tile of rows.
template <class Operand>
struct Nearest {
  static constexpr int EDGE = Shape<Operand>::EDGE;
  int labels[EDGE];  // K past the last row, and for an undecided row
  Sum<Operand> lowest[EDGE], second[EDGE];
  Sum<Operand> inverse_norms[EDGE];
};

template <class Operand>
struct AssignMemory {
  static constexpr int EDGE = Shape<Operand>::EDGE;
  union {
    RowsAndCenters<Operand> factors;
    alignas(32) Sum<Operand> products[EDGE][Shape<Operand>::PRODUCT_STRIDE];
  };
  int64_t rows[EDGE], centers[EDGE];  // of the tile; -1 past the last
  Nearest<Operand> nearest;
  int order[EDGE];                    // the tile's rows by cluster
  int begin[MAX_SUMMED + 1];         // first position of each cluster in that order
};

// Computes <x_i, c_k> of the tile in shared memory. Ends with a barrier, so that every thread may read it.
template <class Operand>
__device__ __forceinline__ void multiply_centers(const AssignProblem<Sum<Operand>>& problem,
                                                 AssignMemory<Operand>& shared) {
  using S = Shape<Operand>;
  constexpr int THREADS = AssignShape<Operand>::THREADS, PARTS = AssignShape<Operand>::PARTS;
  const int64_t width = problem.samples.width;
  auto& factors = shared.factors;
  Products<Operand, S::EDGE, THREADS> products;
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

// Merges the two lowest scores of another thread.
template <class T>
__device__ __forceinline__ void take_lowest(T other, T other_second, T& lowest, T& second) {
  second = min(min(second, other_second), max(lowest, other));
  lowest = min(lowest, other);
}

// Finds the labels of the tile's rows and their two lowest scores, of the centres from `begin` to `end`; TEAM threads
// share a row. Equal scores go to the first centre, and a row whose scores are all NaN gets label 0.
template <class Operand>
__device__ __forceinline__ void find_nearest(const AssignProblem<Sum<Operand>>& problem, int64_t first_row, int begin,
                                             int end, AssignMemory<Operand>& shared) {
  using T = Sum<Operand>;
  constexpr int EDGE = Shape<Operand>::EDGE, TEAM = AssignShape<Operand>::TEAM, LANES = 4;
  const int tile_row = threadIdx.x / TEAM, member = threadIdx.x % TEAM;
  if (threadIdx.x < EDGE) {
    const int64_t row = first_row + threadIdx.x;
    shared.rows[threadIdx.x] = row < problem.samples.n ? row : -1;
  }
  T lowest = INFINITY, second = INFINITY;
  int label = 0;
  for (int start = begin; start < end; start += EDGE) {
    if (threadIdx.x < EDGE) {
      const int center = start + int(threadIdx.x);
      shared.centers[threadIdx.x] = center < problem.clusters ? center : -1;
    }
    __syncthreads();
    multiply_centers(problem, shared);
    for (int first = member * LANES; first < EDGE; first += TEAM * LANES) {
      const auto products = load<LANES>(&shared.products[tile_row][first]);
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
    const T other_second = __shfl_xor_sync(0xffffffff, second, lanes);
    const int other_label = __shfl_xor_sync(0xffffffff, label, lanes);
    if (other < lowest || (other == lowest && other_label < label)) label = other_label;
    take_lowest(other, other_second, lowest, second);
  }
  if (member > 0) return;
  shared.nearest.labels[tile_row] = first_row + tile_row < problem.samples.n ? label : problem.clusters;
  shared.nearest.lowest[tile_row] = lowest;
  shared.nearest.second[tile_row] = second;
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int lanes = 1; lanes < WARP; lanes *= 2) value += __shfl_xor_sync(0xffffffff, value, lanes);
  return value;
}

// Returns whether no other label is possible within rounding, from a row's two lowest scores and the squared norm of
// the row as it is multiplied; see `score_limits` in mcl_kernels/kmeans/gpu_common.py.
template <class T>
__device__ __forceinline__ bool is_decided(const AssignProblem<T>& problem, T lowest, T second, T squares) {
  const T* limits = problem.limits;
  const T above = limits[0] * squares + limits[1];
  T bound = limits[2] + limits[3] * sqrt(above);
  if (!problem.samples.inverse_norms) bound = min(bound, limits[4] * above + limits[5] * second);
  return second - lowest > bound + limits[6] + limits[7] * above;
}

// Computes the distance of each row to its centre from differences, and whether its label is decided. Each row is read
// by one warp, from the cache. For cosine, a row whose squares leave the range of fp32, or without a direction, is
// undecided.
template <class Operand>
__device__ __forceinline__ void measure(const AssignProblem<Sum<Operand>>& problem, int64_t first_row,
                                        Nearest<Operand>& nearest) {
  using T = Sum<Operand>;
  using S = AssignShape<Operand>;
  const Samples<T>& samples = problem.samples;
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const bool is_relative = samples.offset && !problem.half;  // whether rows were multiplied relative to the offset
  for (int tile_row = warp; tile_row < S::EDGE; tile_row += S::WARPS) {
    const int64_t row = first_row + tile_row;
    if (row >= samples.n) break;
    const int label = nearest.labels[tile_row];
    const T* center = problem.centers + label * samples.width;
    T distance = 0, squares = 0, factor = 1;
#pragma unroll 4
    for (int64_t feature = lane; feature < samples.width; feature += WARP) {
      const T value = value_at<Operand>(samples.x, row, feature);
      const T multiplied = is_relative ? value - samples.offset[feature] : value;
      squares += multiplied * multiplied;
    }
    squares = warp_sum(squares);
    bool decided = is_decided(problem, nearest.lowest[tile_row], nearest.second[tile_row], squares);
    if (samples.inverse_norms) {
      decided = decided && squares > T(1e-30) && squares < T(1e30);
      factor = decided ? 1 / sqrt(squares) : T(0);
    }
#pragma unroll 4
    for (int64_t feature = lane; feature < samples.width; feature += WARP) {
      const T difference = value_at<Operand>(samples.x, row, feature) * factor - center[feature];
      distance += difference * difference;
    }
    distance = warp_sum(distance);
    if (lane > 0) continue;
    problem.labels[row] = label;
    problem.distances[row] = samples.inverse_norms ? distance / 2 : distance;
    problem.undecided[row] = !decided;
    if (samples.inverse_norms) samples.inverse_norms[row] = factor;
    nearest.labels[tile_row] = decided ? label : problem.clusters;
    nearest.inverse_norms[tile_row] = factor;
  }
}

// Adds the tile's rows to the block's sums; a warp takes WARP features of a cluster. Returns the number of rows in the
// cluster whose index is the thread's.
template <class Operand>
__device__ __forceinline__ int add_to_sums(const AssignProblem<Sum<Operand>>& problem, int64_t first_row,
                                           AssignMemory<Operand>& shared) {
  using T = Sum<Operand>;
  using S = AssignShape<Operand>;
  if (threadIdx.x < S::EDGE) {
    const int label = shared.nearest.labels[threadIdx.x];
    int before = 0;
    for (int row = 0; row < S::EDGE; row++)
      before += shared.nearest.labels[row] < label || (shared.nearest.labels[row] == label && row < int(threadIdx.x));
    shared.order[before] = threadIdx.x;
  }
  if (int(threadIdx.x) <= problem.clusters) {
    int before = 0;
    for (int row = 0; row < S::EDGE; row++) before += shared.nearest.labels[row] < int(threadIdx.x);
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
          const int tile_row = shared.order[begin + i];
          return entry_at<Operand>(samples, first_row + tile_row, feature, shared.nearest.inverse_norms[tile_row]);
        });
  }
  const bool counts = int(threadIdx.x) < problem.clusters;
  return counts ? shared.begin[threadIdx.x + 1] - shared.begin[threadIdx.x] : 0;
}

// A block owns every `blocks`-th tile of EDGE rows. The barriers in `find_nearest` order its results after all reads of
// those of the previous tile.
template <class Operand>
__global__ void __launch_bounds__(AssignShape<Operand>::THREADS, 2)
assign_clusters_kernel(const AssignProblem<Sum<Operand>> problem) {
  constexpr int EDGE = Shape<Operand>::EDGE;
  auto& shared = shared_memory<AssignMemory<Operand>>();
  int64_t count = 0;
  for (int64_t first_row = int64_t(blockIdx.x) * EDGE; first_row < problem.samples.n;
       first_row += int64_t(problem.blocks) * EDGE) {
    find_nearest(problem, first_row, 0, problem.clusters, shared);
    __syncthreads();
    measure(problem, first_row, shared.nearest);
    if (!problem.sums) continue;
    __syncthreads();
    count += add_to_sums(problem, first_row, shared);
  }
  if (problem.sums && int(threadIdx.x) < problem.clusters)
    problem.counts[int64_t(blockIdx.x) * problem.clusters + threadIdx.x] = count;
}

// A block finds the two lowest scores of a tile of rows in one part of the centres: successive tiles, or none. Blocks of
// one part follow each other, so that its centres are read from the cache.
template <class Operand>
__global__ void __launch_bounds__(AssignShape<Operand>::THREADS, 2)
find_parts_kernel(const AssignProblem<Sum<Operand>> problem) {
  constexpr int EDGE = Shape<Operand>::EDGE;
  auto& shared = shared_memory<AssignMemory<Operand>>();
  const int part = blockIdx.x / problem.blocks;
  const int64_t first_row = int64_t(blockIdx.x % problem.blocks) * EDGE, n = problem.samples.n;
  const int64_t tiles = (problem.clusters + EDGE - 1) / EDGE;
  const int begin = int(part * tiles / problem.parts) * EDGE, end = int((part + 1) * tiles / problem.parts) * EDGE;
  find_nearest(problem, first_row, begin, end, shared);
  __syncthreads();
  const int64_t row = first_row + threadIdx.x;
  if (threadIdx.x >= EDGE || row >= n) return;
  problem.part_scores[part * n + row] = shared.nearest.lowest[threadIdx.x];
  problem.part_scores[(problem.parts + part) * n + row] = shared.nearest.second[threadIdx.x];
  problem.part_labels[part * n + row] = shared.nearest.labels[threadIdx.x];
}

// A block joins the parts of a tile of rows, in the order of the centres.
template <class Operand>
__global__ void __launch_bounds__(AssignShape<Operand>::THREADS)
join_parts_kernel(const AssignProblem<Sum<Operand>> problem) {
  using T = Sum<Operand>;
  auto& nearest = shared_memory<Nearest<Operand>>();
  const int64_t first_row = int64_t(blockIdx.x) * Shape<Operand>::EDGE, n = problem.samples.n;
  const int64_t row = first_row + threadIdx.x;
  if (threadIdx.x < Shape<Operand>::EDGE && row < n) {
    T lowest = INFINITY, second = INFINITY;
    int label = 0;
    for (int part = 0; part < problem.parts; part++) {
      const T later = problem.part_scores[part * n + row];
      if (later < lowest) label = problem.part_labels[part * n + row];
      take_lowest(later, problem.part_scores[(problem.parts + part) * n + row], lowest, second);
    }
    nearest.labels[threadIdx.x] = label;
    nearest.lowest[threadIdx.x] = lowest;
    nearest.second[threadIdx.x] = second;
  }
  __syncthreads();
  measure(problem, first_row, nearest);
}

template <class Operand>
cudaError_t launch_assign(AssignProblem<Sum<Operand>> problem, cudaStream_t stream) {
  using S = AssignShape<Operand>;
  if (problem.sums && (problem.clusters > MAX_SUMMED || problem.parts > 1)) return cudaErrorInvalidConfiguration;
  if (!problem.sums) problem.blocks = int((problem.samples.n + S::EDGE - 1) / S::EDGE);
  if (problem.blocks == 0) return cudaSuccess;
  if (problem.parts > 1) {
    const int64_t blocks = int64_t(problem.blocks) * problem.parts;
    const cudaError_t error =
        launch<AssignMemory<Operand>>(find_parts_kernel<Operand>, blocks, S::THREADS, problem, stream);
    if (error != cudaSuccess) return error;
    return launch<Nearest<Operand>>(join_parts_kernel<Operand>, problem.blocks, S::THREADS, problem, stream);
  }
  return launch<AssignMemory<Operand>>(assign_clusters_kernel<Operand>, problem.blocks, S::THREADS, problem, stream);
}

}  // namespace mcl
