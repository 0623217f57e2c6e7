// Arguments of the kernels of masked_logsumexp, in plain data.
//
// A kernel compares tiles of the rows of one side, queries or keys, with the rows of the other side, its columns.
// "Sorted" is the order of the plan; sorted row r is row order[r] of the data. Null pointers stand for arguments that
// are not given.
#pragma once

#include <functional>

#include "matrix.h"

namespace mcl {

// Provides memory of the device, which lives until the launches of a call have run.
using Allocate = std::function<void*(int64_t bytes)>;

// The side that has a result for each row.
struct Rows {
  Matrix x;                              // [n, D]
  const int64_t* order;                  // [n], sorted -> original
  int n;
  const int64_t *begin, *end;            // [n], sorted: the columns of the row; equal if there are none
  const int32_t *drop_begin, *drop_end;  // [n], sorted: the columns among them that the row drops
  const int64_t* ids;                    // [n], original: the row also drops the columns of its id
};

// The side that they are compared with.
struct Columns {
  Matrix y;              // [m, D]
  const int64_t* order;  // [m], sorted -> original
  int m;
  const int64_t* ids;    // [m], original
};

// The columns of the rows of a row tile, from the first to the last, without a hole of complete tiles that every row
// drops.
struct Span {
  int first, last, hole_begin, hole_end;
};

// How programs share the products of all row tiles; see work_list.cuh.
struct WorkList {
  int row_tiles, programs;
  int64_t* tile_units;     // [row_tiles + 1], the first unit of each row tile; then the number of units
  int64_t* program_units;  // [programs + 1], the first unit of each program; then the number of units
  int* program_tiles;      // [programs], the row tile of that unit; row_tiles for a program without units
  Span* spans;             // [row_tiles]
};

// Computes the work list of row tiles of `edge` rows.
struct UnitProblem {
  Rows rows;
  int edge;
  bool skips_tiles;  // as in `Pairs`
  WorkList work;
};

// T, the type of logits and sums, is float or double.
template <class T>
struct Pairs {
  Rows rows;
  Columns columns;
  int64_t width;     // D
  bool half;         // both sides have the same 16-bit dtype, in which they are multiplied
  bool skips_tiles;  // tiles that all rows drop are likely, and not computed
  const T* scale;    // [n], original; with scale_stride 0 a single scalar
  int64_t scale_stride;
};

// Computes lse, or if it is null the count.
template <class T>
struct ForwardProblem {
  Pairs<T> pairs;
  T* lse;              // [n], original: log sum_j exp(s_ij)
  const T* threshold;  // [n], original
  int64_t* count;      // [n], original: kept columns with not (<x_i, y_j> <= threshold_i), so that NaN counts as above
  WorkList work{};
  void* partials = nullptr;  // workspace [2 programs, rows of a tile]: results of parts of row tiles
};

// W_ij = row_weight_i exp(s_ij - row_lse_i) + column_weight_j exp(s_ij - column_lse_j), each term if given.
template <class T>
struct BackwardProblem {
  Pairs<T> pairs;
  const T *row_lse, *row_weight;        // [n], original
  const T *column_lse, *column_weight;  // [m], original
  const T* column_scale;                // [m], original: of the logits, in place of the scale of the rows
  const T* fp16_scale;                  // the power of 2 that brings pair weights into the range of fp16
  void* grad_x;                         // [n, D], dense, in the dtype of x: scale_i sum_j W_ij y_j
  T* grad_scale;                        // [n], original: sum_j W_ij <x_i, y_j>
  WorkList work{};
  T* partials = nullptr;  // workspace [2 programs, rows of a tile, partial_width]: sums of parts of row tiles
  int64_t partial_width = 0, scale_at = 0;  // the gradient of a row, and from `scale_at` on that of its scale
};

}  // namespace mcl
