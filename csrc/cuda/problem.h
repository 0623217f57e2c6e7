// What the kernels compute, in plain data: shared by the kernels, their launchers and the binding to torch.
//
// A kernel's blocks own tiles of the rows of one side, queries or keys, and meet the other side's rows as columns.
// "Sorted" is the order of the plan; sorted row r is row order[r] of the data. Null pointers are what is not there.
#pragma once

#include <cstdint>

namespace mcl {

enum class Dtype { float32, float64, bfloat16, float16 };

// [size, D], any strides, in elements.
struct Matrix {
  const void* data;
  int64_t row_stride, step;
  Dtype dtype;
  bool in_vectors;  // rows are dense, and begin at multiples of 16 bytes
};

// The side whose rows the blocks own.
struct Rows {
  Matrix x;                               // [n, D]
  const int64_t* order;                   // [n], sorted -> original
  int n;
  const int64_t *begin, *end;             // [n], sorted: the columns that a row meets; equal where none
  const int32_t *drop_begin, *drop_end;   // [n], sorted: those of them that it drops
  const int64_t* ids;                     // [n], original; a row drops the columns of its id, too
};

// The side that they meet.
struct Columns {
  Matrix y;              // [m, D]
  const int64_t* order;  // [m], sorted -> original
  const int64_t* ids;    // [m], original
};

// T, the type of logits and sums, is float or double.
template <class T>
struct Pairs {
  Rows rows;
  Columns columns;
  int64_t width;         // D
  bool half;             // both sides' dtype is the same one of 16 bits: they are multiplied as they are
  bool skips_tiles;      // whole tiles may be dropped by every row: they are not computed
  const T* scale;        // [n], original; with scale_stride 0 one number
  int64_t scale_stride;
};

template <class T>
struct ForwardProblem {
  Pairs<T> pairs;
  T* lse;              // [n], original: log sum_j exp(s_ij); or, where it is null,
  const T* threshold;  // [n], original
  int64_t* count;      // [n], original: the kept columns that have not <x_i, y_j> <= threshold_i
};

// W_ij = row_weight_i exp(s_ij - row_lse_i) + column_weight_j exp(s_ij - column_lse_j), each term where it is there.
template <class T>
struct BackwardProblem {
  Pairs<T> pairs;
  const T *row_lse, *row_weight;        // [n], original
  const T *column_lse, *column_weight;  // [m], original
  const T* column_scale;                // [m], original: of the logits, in place of the rows'
  const T* unit;                        // the power of 2 that brings pair weights into the range of fp16
  void* grad_x;                         // [n, D], dense, in the dtype of x: scale_i sum_j W_ij y_j
  T* grad_scale;                        // [n], original: sum_j W_ij <x_i, y_j>
};

enum class Negatives { same, different, all };  // as numbered by NEGATIVES in mcl_kernels/logsumexp/pairs.py

// Queries or keys before they are sorted, and what is wanted of them.
struct PlanSide {
  const int64_t *labels, *ids;  // [n]; null: one label, one id
  int n;
  int64_t* order;         // [n]: the rows by (label, id), as far as labels matter; equal ones as they come
  int64_t *begin, *end;   // [n], sorted: the other side's sorted rows that each row meets
};

struct PlanProblem {
  PlanSide queries, keys;
  bool self;  // the keys are the queries
  Negatives negatives;
  int64_t* sorted_tiles;  // [3, n + m] of work space; null: each block sorts for itself, as suits one tile a side
};

// Which columns each row drops, since they have its value: neighbours among those it meets.
struct DropProblem {
  const int64_t *row_order, *row_begin, *row_end, *row_values;  // [n]; values in the original order
  const int64_t *column_order, *column_values;                  // [m]
  int n;
  int32_t *drop_begin, *drop_end;  // [n], sorted
};

// Of k-means: rows, and their entries as they are summed.
template <class T>
struct Samples {
  Matrix x;          // [n, D]
  int64_t n, width;  // width: D
  const T* offset;   // [D]: an entry is x_if - offset_f; but where the metric is cosine
  T* inverse_norms;  // [n], 1 / |x_i|, 0 without a direction: x_if / |x_i|
};

// By column, how entries are rounded so that sums of them are exact.
template <class T>
struct FixedPoint {
  const T* rounding;   // [D], 1.5 * 2^e: adding and subtracting it rounds fp64 entries, and of fp32 the low integer
  const float* scale;  // [D], of fp32: makes the high integer of an entry
  const double* unit;  // [D], of fp32: what 1 in the low integer stands for
};

template <class T>
struct AssignProblem {
  Samples<T> samples;
  bool half;             // rows of 16 bits are multiplied as they are, others relative to the offset
  Matrix high, low;      // [K, D] in the type that is multiplied: centres, where half as the sum of two
  const T* centers;      // [K, D]
  const T* half_norms;   // [K]: the nearest centre has the least half_norms_k - <x_i, c_k>
  const T* limits;       // [8]: how far the second least has to be above it
  int clusters;          // K
  int64_t* labels;       // [n]
  T* distances;          // [n]
  bool* undecided;       // [n]: rounding could give the row another label; it is not summed
  FixedPoint<T> entries;
  double* sums;          // [blocks, K, D], added to; null: nothing is summed
  int64_t* counts;       // [blocks, K]
  int blocks;
};

// Sums of pieces of a cluster, at most 256 rows each.
template <class T>
struct PieceProblem {
  Samples<T> samples;
  FixedPoint<T> entries;
  const int64_t* order;          // [n], rows by cluster
  const int64_t *begin, *end;    // [pieces], in that order; equal, or the other way round, where there are no rows
  int64_t pieces;
  double* sums;                  // [pieces, D]
};

struct JoinProblem {
  const double* pieces;          // [pieces, D]
  const int64_t *begin, *end;    // [K], the pieces of a cluster
  int64_t clusters, width;
  double* sums;                  // [K, D]
};

}  // namespace mcl
