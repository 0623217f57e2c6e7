// The gradient of the rows of one side, in a single pass over their columns.
//
//   W_ij = row_weight_i exp(s_ij - row_lse_i) + column_weight_j exp(s_ij - column_lse_j)   where kept, else 0
//   grad_x_i = scale_i sum_j W_ij y_j,  grad_scale_i = sum_j W_ij <x_i, y_j>
#pragma once

#include "work_list.cuh"

namespace mcl {

// A block holds the sums of GRADIENTS features in registers. Wider rows are split into parts of GRADIENTS features,
// each with a block of its own that computes the logits again.
template <class Operand>
struct BackwardShape {
  static constexpr int EDGE = Shape<Operand>::EDGE, CHUNKS = 4, GRADIENTS = EDGE * CHUNKS;
  static constexpr int THREADS = 256, TEAM = THREADS / EDGE;
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

// Writes the block's features of the gradient, chunk by chunk through shared memory: to the result, or to a slot.
template <class Operand>
__device__ __forceinline__ void write_gradient(const BackwardProblem<Sum<Operand>>& problem, int64_t first_feature,
                                               int slot, BackwardMemory<Operand>& shared,
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
      if (original < 0 || first + feature >= pairs.width) continue;
      const auto value = products[tile_row][feature] * shared.row_factors[tile_row];
      if (slot < 0)
        write(problem.grad_x, pairs.rows.x.dtype, original * pairs.width + first + feature, value);
      else
        problem.partials[(int64_t(slot) * S::EDGE + tile_row) * problem.partial_width + first + feature] = value;
    }
    __syncthreads();
  }
}

// Does the units of a program, for GRADIENTS features of the gradient. Cost of all: the products of all pairs once for
// the gradient, and once for the logits of each part of GRADIENTS features.
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
  const T fp16_scale = problem.fp16_scale ? *problem.fp16_scale : T(1);
  const int tile_row = threadIdx.x / S::TEAM;
  const bool leads = threadIdx.x % S::TEAM == 0;  // the first of the threads that share a row

  Program<S::EDGE> program(problem.work, int(blockIdx.x / parts));
  for (Stretch stretch; program.next(stretch);) {
    const Row row = load_row(pairs.rows, stretch.row_tile * S::EDGE + tile_row);
    const bool valid = row.original >= 0;
    const T scale = valid ? pairs.scale[row.original * pairs.scale_stride] : T(0);
    const T row_lse = valid && problem.row_lse ? problem.row_lse[row.original] : T(0);
    const T row_weight = valid && problem.row_lse ? problem.row_weight[row.original] : T(0);
    if (leads) {
      shared.indices.rows[tile_row] = row.original;
      shared.row_factors[tile_row] = scale / fp16_scale;
    }

    GradientSums<Operand> sums[S::CHUNKS];
#pragma unroll
    for (int chunk = 0; chunk < S::CHUNKS; chunk++) sums[chunk].clear();
    T scale_sum = 0;
    for (int start = stretch.first; start < stretch.last; start = stretch.tile_at(start + S::EDGE)) {
      load_columns(pairs.columns, start, stretch.last, shared.indices);
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
      if (valid && leads) {
        if (stretch.slot < 0)
          problem.grad_scale[row.original] = scale_sum;
        else
          problem.partials[(int64_t(stretch.slot) * S::EDGE + tile_row) * problem.partial_width + problem.scale_at] =
              scale_sum;
      }
    }
    if (problem.grad_x) write_gradient(problem, first_feature, stretch.slot, shared, sums);
  }
}

constexpr int JOINED_LANES = 4;  // sums that a thread of the second kernel adds

// Adds the parts of the row tile that a block is for.
template <class T>
__global__ void __launch_bounds__(JOIN_THREADS) join_gradients_kernel(const BackwardProblem<T> problem) {
  constexpr int EDGE = Shape<T>::EDGE;
  const Rows& rows = problem.pairs.rows;
  const int64_t width = problem.partial_width, vectors = width / JOINED_LANES;
  const int64_t blocks = (EDGE * vectors + JOIN_THREADS - 1) / JOIN_THREADS;
  Cut cut;
  if (!find_cut(problem.work, int(1 + blockIdx.x / blocks), cut)) return;
  const int64_t item = blockIdx.x % blocks * JOIN_THREADS + threadIdx.x;
  const int64_t tile_row = item / vectors, first = item % vectors * JOINED_LANES;
  const int64_t sorted = int64_t(cut.row_tile) * EDGE + tile_row;
  if (tile_row >= EDGE || sorted >= rows.n) return;
  const T* partials = problem.partials + tile_row * width + first;
  auto sums = load<JOINED_LANES>(partials + cut.first_slot * EDGE * width);
#pragma unroll 8
  for (int program = cut.second; program < cut.past; program++) {
    const auto part = load<JOINED_LANES>(partials + 2 * program * EDGE * width);
#pragma unroll
    for (int k = 0; k < JOINED_LANES; k++) sums.lanes[k] += part.lanes[k];
  }
  const int64_t original = rows.order[sorted];
  if (problem.grad_scale && first == problem.scale_at) problem.grad_scale[original] = sums.lanes[0];
  if (!problem.grad_x) return;
#pragma unroll
  for (int k = 0; k < JOINED_LANES; k++)
    if (first + k < problem.pairs.width)
      write(problem.grad_x, rows.x.dtype, original * problem.pairs.width + first + k, sums.lanes[k]);
}

template <class Operand>
cudaError_t launch_backward(BackwardProblem<Sum<Operand>> problem, int64_t programs, const Allocate& allocate,
                            cudaStream_t stream) {
  using T = Sum<Operand>;
  using S = BackwardShape<Operand>;
  using Memory = BackwardMemory<Operand>;
  static_assert(S::EDGE == Shape<T>::EDGE);
  if (problem.pairs.rows.n == 0 || (!problem.grad_x && !problem.grad_scale)) return cudaSuccess;
  const auto kernel = masked_lse_backward_kernel<Operand>;
  const int64_t width = problem.pairs.width;
  const int64_t parts = problem.grad_x ? (width + S::GRADIENTS - 1) / S::GRADIENTS : 1;
  problem.scale_at = problem.grad_x ? (width + JOINED_LANES - 1) / JOINED_LANES * JOINED_LANES : 0;
  problem.partial_width = problem.scale_at + (problem.grad_scale ? JOINED_LANES : 0);
  const int64_t slot = S::EDGE * problem.partial_width * sizeof(T);
  cudaError_t error = list_work<Memory, S::EDGE>(kernel, problem, S::THREADS, parts, slot, programs, allocate, stream);
  if (error != cudaSuccess) return error;
  programs = problem.work.programs;
  if (programs > 1) problem.partials = static_cast<T*>(allocate(2 * slot * programs));
  error = launch<Memory>(kernel, programs * parts, S::THREADS, problem, stream);
  if (error != cudaSuccess || programs == 1) return error;
  const int64_t blocks = (slot / int64_t(sizeof(T)) / JOINED_LANES + JOIN_THREADS - 1) / JOIN_THREADS;
  return launch<NoMemory>(join_gradients_kernel<T>, (programs - 1) * blocks, JOIN_THREADS, problem, stream);
}

}  // namespace mcl
