// The gradient of the rows of one side, in a single pass over their columns.
//
//   W_ij = row_weight_i exp(s_ij - row_lse_i) + column_weight_j exp(s_ij - column_lse_j)   where kept, else 0
//   grad_x_i = scale_i sum_j W_ij y_j,  grad_scale_i = sum_j W_ij <x_i, y_j>
#pragma once

#include "tiles.cuh"

namespace mcl {

// A block holds the sums of GRADIENTS features in registers. Wider rows are split into parts of GRADIENTS features,
// each with a block of its own that computes the logits again: this fills a GPU that a small batch would leave idle.
template <class Operand>
struct BackwardShape {
  static constexpr int EDGE = Shape<Operand>::EDGE, CHUNKS = 4, GRADIENTS = EDGE * CHUNKS;
  static constexpr int THREADS = sizeof(Operand) == 8 ? 128 : 256, TEAM = THREADS / EDGE;
  static constexpr int STRIDE = EDGE + Shape<Operand>::PADDING;  // of weights and features
};

// The terms of pair weights that depend on the column.
template <class T, int EDGE>
struct ColumnTerms {
  T lse[EDGE], weight[EDGE], scale[EDGE];
};

template <class Operand>
struct BackwardMemory {
  using S = BackwardShape<Operand>;
  union {
    ProductMemory<Operand> memory;                     // until the weights are computed
    alignas(32) Operand features[S::EDGE][S::STRIDE];  // of the columns
  };
  alignas(32) Operand weights[S::EDGE][S::STRIDE];
  TileIndices<S::EDGE> indices;
  ColumnTerms<Sum<Operand>, S::EDGE> columns;
  Sum<Operand> row_factors[S::EDGE];
  int warp_maxima[S::THREADS / WARP];
};

template <class T, int EDGE>
__device__ __forceinline__ void load_column_terms(const BackwardProblem<T>& problem, const TileIndices<EDGE>& indices,
                                                  ColumnTerms<T, EDGE>& to) {
  if (threadIdx.x >= EDGE) return;
  const int64_t original = indices.columns[threadIdx.x];  // written by this thread: no barrier is needed
  if (problem.column_lse) {
    to.lse[threadIdx.x] = original < 0 ? T(0) : problem.column_lse[original];
    to.weight[threadIdx.x] = original < 0 ? T(0) : problem.column_weight[original];
  }
  if (problem.column_scale) to.scale[threadIdx.x] = original < 0 ? T(0) : problem.column_scale[original];
}

template <class Operand>
using GradientSums = Products<Operand, BackwardShape<Operand>::EDGE, BackwardShape<Operand>::THREADS>;

// Adds the columns of the tile, multiplied by their weights, to the sums of each chunk of features.
template <class Operand>
__device__ __forceinline__ void add_weighted_columns(const Pairs<Sum<Operand>>& pairs, int64_t first_feature,
                                                     BackwardMemory<Operand>& shared,
                                                     GradientSums<Operand> (&sums)[BackwardShape<Operand>::CHUNKS]) {
  using S = BackwardShape<Operand>;
#pragma unroll
  for (int chunk = 0; chunk < S::CHUNKS; chunk++) {
    const int64_t first = first_feature + chunk * S::EDGE;
    if (first >= pairs.width) break;
    load_part<S::EDGE, S::THREADS>(pairs.columns.y, shared.indices.columns, first, pairs.width, shared.features);
    __syncthreads();
    sums[chunk].template add<S::EDGE, Layout::rows_are_terms>(shared.weights[0], S::STRIDE, shared.features[0],
                                                              S::STRIDE);
    __syncthreads();
  }
}

// Writes the block's features of the gradient, chunk by chunk through shared memory.
template <class Operand>
__device__ __forceinline__ void write_gradient(const BackwardProblem<Sum<Operand>>& problem, int64_t first_feature,
                                               BackwardMemory<Operand>& shared,
                                               GradientSums<Operand> (&sums)[BackwardShape<Operand>::CHUNKS]) {
  using S = BackwardShape<Operand>;
  const auto& pairs = problem.pairs;
  auto& products = shared.memory.products;
#pragma unroll
  for (int chunk = 0; chunk < S::CHUNKS; chunk++) {
    const int64_t first = first_feature + chunk * S::EDGE;
    if (first >= pairs.width) break;
    sums[chunk].store(products[0], Shape<Operand>::PRODUCT_STRIDE);
    __syncthreads();
    for (int index = threadIdx.x; index < S::EDGE * S::EDGE; index += S::THREADS) {
      const int tile_row = index / S::EDGE, feature = index % S::EDGE;
      const int64_t original = shared.indices.rows[tile_row];
      if (original >= 0 && first + feature < pairs.width)
        write(problem.grad_x, pairs.rows.x.dtype, original * pairs.width + first + feature,
              products[tile_row][feature] * shared.row_factors[tile_row]);
    }
    __syncthreads();
  }
}

// A block owns EDGE sorted rows, and GRADIENTS features of their gradient. Cost: the products of all pairs once for the
// gradient, and once for the logits of each part of GRADIENTS features.
template <class Operand>
__global__ void __launch_bounds__(BackwardShape<Operand>::THREADS, 1)
masked_lse_backward_kernel(const BackwardProblem<Sum<Operand>> problem) {
  using T = Sum<Operand>;
  using S = BackwardShape<Operand>;
  auto& shared = shared_memory<BackwardMemory<Operand>>();
  const Pairs<T>& pairs = problem.pairs;
  const bool compares_ids = pairs.rows.ids != nullptr;
  const int64_t parts = problem.grad_x ? (pairs.width + S::GRADIENTS - 1) / S::GRADIENTS : 1;
  const int64_t first_feature = blockIdx.x % parts * S::GRADIENTS;

  const int tile_row = threadIdx.x / S::TEAM;
  const bool leads = threadIdx.x % S::TEAM == 0;  // the first of the threads that share a row
  const Row row = load_row(pairs.rows, int(blockIdx.x / parts) * S::EDGE + tile_row);
  const bool valid = row.original >= 0;
  const T scale = valid ? pairs.scale[row.original * pairs.scale_stride] : T(0);
  const T row_lse = valid && problem.row_lse ? problem.row_lse[row.original] : T(0);
  const T row_weight = valid && problem.row_lse ? problem.row_weight[row.original] : T(0);
  const T fp16_scale = problem.fp16_scale ? *problem.fp16_scale : T(1);
  if (leads) {
    shared.indices.rows[tile_row] = row.original;
    shared.row_factors[tile_row] = scale / fp16_scale;
  }
  const Span span = find_span<S::EDGE, S::THREADS>(row, pairs.skips_tiles, shared.warp_maxima);

  GradientSums<Operand> sums[S::CHUNKS];
#pragma unroll
  for (int chunk = 0; chunk < S::CHUNKS; chunk++) sums[chunk].clear();
  T scale_sum = 0;
  for (int start = span.tile_at(span.first); start < span.last; start = span.tile_at(start + S::EDGE)) {
    load_columns(pairs.columns, start, span.last, shared.indices);
    load_column_terms(problem, shared.indices, shared.columns);
    __syncthreads();
    multiply_tile<Operand, S::THREADS>(pairs, shared.indices, shared.memory);

    for_each_product<Operand, S::TEAM>(
        row, start, compares_ids, shared.indices, shared.memory, [&](int column, T product, bool kept) {
          T weight = 0;
          if (kept) {
            const T logit = multiply_rounded(product, problem.column_scale ? shared.columns.scale[column] : scale);
            if (problem.row_lse) weight = row_weight * exp(logit - row_lse);
            if (problem.column_lse)
              weight += shared.columns.weight[column] * exp(logit - shared.columns.lse[column]);
            scale_sum += weight * product;
          }
          shared.weights[tile_row][column] = rounded<Operand>(weight * fp16_scale);
        });
    __syncthreads();

    if (problem.grad_x) add_weighted_columns(pairs, first_feature, shared, sums);
  }

  if (problem.grad_scale && first_feature == 0) {  // the same for all parts of the features
#pragma unroll
    for (int lanes = 1; lanes < S::TEAM; lanes *= 2) scale_sum += __shfl_xor_sync(0xffffffff, scale_sum, lanes);
    if (valid && leads) problem.grad_scale[row.original] = scale_sum;
  }
  if (problem.grad_x) write_gradient(problem, first_feature, shared, sums);
}

template <class Operand>
cudaError_t launch_backward(const BackwardProblem<Sum<Operand>>& problem, cudaStream_t stream) {
  using S = BackwardShape<Operand>;
  const int n = problem.pairs.rows.n;
  const int64_t parts = problem.grad_x ? (problem.pairs.width + S::GRADIENTS - 1) / S::GRADIENTS : 1;
  if (n == 0) return cudaSuccess;
  return launch<BackwardMemory<Operand>>(masked_lse_backward_kernel<Operand>,
                                         (int64_t(n) + S::EDGE - 1) / S::EDGE * parts, S::THREADS, problem, stream);
}

}  // namespace mcl
