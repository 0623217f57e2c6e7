// Arguments of the kernels of masked_logsumexp, in plain data.
#pragma once

#include "matrix.h"

namespace mcl {

// Queries or keys. "Sorted" is the order of the plan; sorted row r is row order[r] of the data.
struct Side {
  Matrix rows;
  const int64_t* order;  // [size], sorted -> original
  const int32_t* code;   // [size], sorted: rows with equal codes are not paired; null: the dropped ranges are complete
};

// T, the type of logits and sums, is float or double.
template <class T>
struct Problem {
  Side query, key;     // the same side twice in the self form
  int64_t width;       // D
  bool self;           // keys are queries: a task on the diagonal visits each pair once
  const T* scale;      // [N], original order; with scale_stride 0 a single scalar
  int64_t scale_stride;
  const int64_t* drop_begin;  // [N], sorted: the keys at drop_begin .. drop_end - 1 are not negatives of the query
  const int64_t* drop_end;    // [N]

  // Forward: the running reference and sum of exponentials, sorted. In the self form columns are rows.
  T* row_shift;     // [N]
  T* row_total;     // [N]
  T* column_shift;  // [M]; null: one direction
  T* column_total;  // [M]

  // Backward: LSE and its gradient, and the requested gradients (null: not requested).
  const T* row_lse;      // [N], original order
  const T* row_grad;     // [N]
  const T* column_lse;   // [M]; null: one direction
  const T* column_grad;  // [M]
  T* grad_query;         // [N, D], original order; accumulates scale_i sum_j W_ij k_j
  T* grad_key;           // [M, D]; accumulates sum_i scale_i W_ij q_i
  T* grad_scale;         // [N], sorted; accumulates sum_j W_ij <q_i, k_j>

  // Counting: number of kept keys with not (<q_i, k_j> <= threshold_i), so that NaN counts as above.
  const T* threshold;  // [N], original order
  int64_t* count;      // [N], original order
};

constexpr int64_t NO_TASK = -1;

// A rectangle of sorted queries and keys. On the diagonal both ranges are the same, and only pairs with column > row
// count.
struct Task {
  int64_t row_begin, rows;
  int64_t column_begin, columns;
  bool diagonal;
  int64_t previous_of_rows, previous_of_columns;  // the last earlier task with the same queries, the same keys
};

template <class T>
using TaskFunction = void (*)(const Problem<T>& problem, const Task& task, char* workspace);

}  // namespace mcl
