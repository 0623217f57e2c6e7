// The gradient of the rows of one side, in a single pass over what they meet.
//
//   W_ij = row_weight_i exp(s_ij - row_lse_i) + column_weight_j exp(s_ij - column_lse_j)   where kept, else 0
//   grad_x_i = scale_i sum_j W_ij y_j,  grad_scale_i = sum_j W_ij <x_i, y_j>
#pragma once

#include "tiles.cuh"

namespace mcl {

// A block holds the sums of GRADIENTS features in registers, and computes the logits for them: of wider rows each part
// of so many features has a block of its own, which fills a GPU that a small batch would leave idle.
template <class Operand>
struct BackwardShape {
  static constexpr int SIDE = Shape<Operand>::SIDE, CHUNKS = 4, GRADIENTS = SIDE * CHUNKS;
  static constexpr int THREADS = sizeof(Operand) == 8 ? 128 : 256, TEAM = THREADS / SIDE;
  static constexpr int STRIDE = SIDE + Shape<Operand>::PADDING;  // of weights, and of features they are multiplied with
};

// What a pair's weight needs to know of its column.
template <class T, int SIDE>
struct ColumnTerms {
  T lse[SIDE], weight[SIDE], scale[SIDE];
};

template <class Operand>
struct BackwardMemory {
  using S = BackwardShape<Operand>;
  union {
    ProductMemory<Operand> memory;                        // until there are weights
    alignas(32) Operand features[S::SIDE][S::STRIDE];     // of the columns
  };
  alignas(32) Operand weights[S::SIDE][S::STRIDE];
  Places<S::SIDE> at;
  ColumnTerms<Sum<Operand>, S::SIDE> columns;
  Sum<Operand> row_factors[S::SIDE];
  int of_warps[S::THREADS / WARP];
};

template <class T, int SIDE>
__device__ __forceinline__ void load_column_terms(const BackwardProblem<T>& problem, const Places<SIDE>& at,
                                                  ColumnTerms<T, SIDE>& to) {
  if (threadIdx.x >= SIDE) return;
  const int64_t place = at.columns[threadIdx.x];  // which this thread has written
  if (problem.column_lse) {
    to.lse[threadIdx.x] = place < 0 ? T(0) : problem.column_lse[place];
    to.weight[threadIdx.x] = place < 0 ? T(0) : problem.column_weight[place];
  }
  if (problem.column_scale) to.scale[threadIdx.x] = place < 0 ? T(0) : problem.column_scale[place];
}

// A block owns SIDE sorted rows, and of their gradient GRADIENTS features. 1 unit of products for the sum, and 1 for
// the logits of each part of so many features.
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

  const int of_tile = threadIdx.x / S::TEAM;
  const bool leads = threadIdx.x % S::TEAM == 0;  // of the threads that share a row
  const Row row = load_row(pairs.rows, int(blockIdx.x / parts) * S::SIDE + of_tile);
  const bool valid = row.place >= 0;
  const T scale = valid ? pairs.scale[row.place * pairs.scale_stride] : T(0);
  const T row_lse = valid && problem.row_lse ? problem.row_lse[row.place] : T(0);
  const T row_weight = valid && problem.row_lse ? problem.row_weight[row.place] : T(0);
  const T unit = problem.unit ? *problem.unit : T(1);
  if (leads) {
    shared.at.rows[of_tile] = row.place;
    shared.row_factors[of_tile] = scale / unit;
  }
  const Span span = find_span<S::SIDE, S::THREADS>(row, pairs.skips_tiles, shared.of_warps);

  Products<Operand, S::SIDE, S::THREADS> sums[S::CHUNKS];
#pragma unroll
  for (int chunk = 0; chunk < S::CHUNKS; chunk++) sums[chunk].clear();
  T scale_sum = 0;
  for (int start = span.tile_at(span.first); start < span.last; start = span.tile_at(start + S::SIDE)) {
    load_columns(pairs.columns, start, span.last, shared.at);
    load_column_terms(problem, shared.at, shared.columns);
    __syncthreads();
    multiply_tile<Operand, S::THREADS>(pairs, shared.at, shared.memory);

    for_each_product<Operand, S::TEAM>(
        row, start, compares_ids, shared.at, shared.memory, [&](int column, T product, bool kept) {
          T weight = 0;
          if (kept) {
            const T logit = multiply_rounded(product, problem.column_scale ? shared.columns.scale[column] : scale);
            if (problem.row_lse) weight = row_weight * exp(logit - row_lse);
            if (problem.column_lse)
              weight += shared.columns.weight[column] * exp(logit - shared.columns.lse[column]);
            scale_sum += weight * product;
          }
          shared.weights[of_tile][column] = rounded<Operand>(weight * unit);
        });
    __syncthreads();

    if (!problem.grad_x) continue;
#pragma unroll
    for (int chunk = 0; chunk < S::CHUNKS; chunk++) {
      const int64_t first = first_feature + chunk * S::SIDE;
      if (first >= pairs.width) break;
      load_part<S::SIDE, S::THREADS>(pairs.columns.y, shared.at.columns, first, pairs.width, shared.features);
      __syncthreads();
      sums[chunk].template add<S::SIDE, Layout::rows_are_terms>(shared.weights[0], S::STRIDE, shared.features[0],
                                                                S::STRIDE);
      __syncthreads();
    }
  }

  if (problem.grad_scale && first_feature == 0) {  // all parts of the features have it
#pragma unroll
    for (int lanes = 1; lanes < S::TEAM; lanes *= 2) scale_sum += __shfl_xor_sync(0xffffffff, scale_sum, lanes);
    if (valid && leads) problem.grad_scale[row.place] = scale_sum;
  }
  if (!problem.grad_x) return;
#pragma unroll
  for (int chunk = 0; chunk < S::CHUNKS; chunk++) {
    const int64_t first = first_feature + chunk * S::SIDE;
    if (first >= pairs.width) break;
    auto& products = shared.memory.products;
    sums[chunk].store(products[0], Shape<Operand>::PRODUCT_STRIDE);
    __syncthreads();
    for (int index = threadIdx.x; index < S::SIDE * S::SIDE; index += S::THREADS) {
      const int of_rows = index / S::SIDE, feature = index % S::SIDE;
      const int64_t place = shared.at.rows[of_rows];
      if (place >= 0 && first + feature < pairs.width)
        write(problem.grad_x, pairs.rows.x.dtype, place * pairs.width + first + feature,
              products[of_rows][feature] * shared.row_factors[of_rows]);
    }
    __syncthreads();
  }
}

template <class Operand>
cudaError_t launch_backward(const BackwardProblem<Sum<Operand>>& problem, cudaStream_t stream) {
  using S = BackwardShape<Operand>;
  const int n = problem.pairs.rows.n;
  const int64_t parts = problem.grad_x ? (problem.pairs.width + S::GRADIENTS - 1) / S::GRADIENTS : 1;
  if (n == 0) return cudaSuccess;
  return launch<BackwardMemory<Operand>>(masked_lse_backward_kernel<Operand>,
                                         (int64_t(n) + S::SIDE - 1) / S::SIDE * parts, S::THREADS, problem, stream);
}

}  // namespace mcl
