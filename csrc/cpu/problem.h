// What the kernels compute, in plain data: shared by every instruction set, so it holds no function and no std type.
#pragma once

#include <cstdint>

namespace mcl {

enum class Dtype { float32, float64, bfloat16, float16 };

// Queries or keys. "Sorted" is the order of the plan; row r of the sorted side is row order[r] of the data.
struct Side {
  const void* data;      // [size, D], the innermost stride is 1
  int64_t row_stride;    // in elements
  Dtype dtype;
  const int64_t* order;  // [size], sorted -> original
  const int32_t* code;   // [size], sorted: rows with equal codes are not paired; null: `drop` says all
};

// masked_logsumexp of the sorted queries and keys. T, the type of logits and sums, is float or double.
template <class T>
struct Problem {
  Side query, key;           // the same side twice in the self form
  int64_t width;             // D
  bool self;                 // keys are queries: a task on the diagonal meets each pair once
  const T* scale;            // [N], original order; with scale_stride 0 one number
  int64_t scale_stride;
  const int64_t* drop_begin; // [N], sorted: the keys at drop_begin .. drop_end - 1 are not negatives of the query
  const int64_t* drop_end;   // [N]

  // Forward: the running reference and sum of exponentials, sorted. In the self form columns are rows.
  T* row_shift;     // [N]
  T* row_total;     // [N]
  T* column_shift;  // [M]; null: one direction
  T* column_total;  // [M]

  // Backward: LSE and its gradient, and the gradients that are wanted (null: not).
  const T* row_lse;      // [N], original order
  const T* row_grad;     // [N]
  const T* column_lse;   // [M]; null: one direction
  const T* column_grad;  // [M]
  T* grad_query;         // [N, D], original order; accumulates scale_i sum_j W_ij k_j
  T* grad_key;           // [M, D]; accumulates sum_i scale_i W_ij q_i
  T* grad_scale;         // [N], sorted; accumulates sum_j W_ij <q_i, k_j>

  // Counting: how many kept keys have not <q_i, k_j> <= threshold_i.
  const T* threshold;  // [N], original order
  int64_t* count;      // [N], original order
};

constexpr int64_t NO_TASK = -1;

// A rectangle of sorted queries and keys. On the diagonal both ranges are the same, and pairs with column > row count.
struct Task {
  int64_t row_begin, rows;
  int64_t column_begin, columns;
  bool diagonal;
  int64_t before_of_rows, before_of_columns;  // the last task before it that has these queries, these keys
};

template <class T>
using TaskFunction = void (*)(const Problem<T>& problem, const Task& task, char* workspace);

// Two views [size, D] of the same samples; null b: rows alone. The innermost strides are 1.
template <class T>
struct Views {
  const T *a, *b;
  int64_t a_stride, b_stride;  // in elements
  int64_t width;
};

// Rows to cluster. T, the type of products and distances, is float or double.
template <class T>
struct Clusters {
  Side rows;  // in their own order: neither `order` nor `code` is there
  int64_t width, centers;
  bool cosine;            // rows are divided by their norms; centres come so
  const T* points;        // [K, D] the centres
  int64_t levels;         // of sums
  const double* rounding; // [levels, D] 1.5 * 2^e, where no sum of a level's entries is above 2^e
  int64_t* labels;        // [N], or null
  int32_t* followed;      // [N] labels of an earlier pass, -1 for none, which become those of this one: sums are what
                          // changed. Or null
  T* distances;           // [N], to the centre of the label
};

// The functions of one instruction set.
template <class T>
struct Kernels {
  TaskFunction<T> forward, backward, count;
  int64_t (*workspace_bytes)(int64_t width, int64_t rows, int64_t columns);
  void (*unit_rows)(const Views<T>& views, int64_t begin, int64_t end, T* unit_a, T* unit_b, T* cosine);
  void (*unit_rows_backward)(const Views<T>& views, int64_t begin, int64_t end, const T* grad_unit_a,
                             const T* grad_unit_b, const T* grad_cosine, T* grad_a, T* grad_b);
  int64_t (*packed_centers_bytes)(int64_t width, int64_t centers);
  void (*pack_centers)(const Clusters<T>& clusters, const T* centers, const T* offset, char* memory);
  int64_t (*cluster_workspace_bytes)(int64_t width);
  void (*cluster_rows)(const Clusters<T>& clusters, char* packed_centers, int64_t begin, int64_t end, double* sums,
                       int64_t* counts, char* workspace);
};

}  // namespace mcl
