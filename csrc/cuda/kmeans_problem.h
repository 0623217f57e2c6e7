// Arguments of the kernels of k-means, in plain data. T, the type of products and distances, is float or double.
#pragma once

#include "matrix.h"

namespace mcl {

// The rows of the data. Their entries, as they are summed, are x_if - offset_f, or for cosine x_if / |x_i|.
template <class T>
struct Samples {
  Matrix x;          // [n, D]
  int64_t n, width;  // width: D
  const T* offset;   // [D]; null for cosine
  T* inverse_norms;  // [n], 1 / |x_i|, or 0 for a row without a direction; null unless cosine
};

// Rounding of the entries of each column, so that their sums are exact.
template <class T>
struct FixedPoint {
  const T* rounding;    // [D], 1.5 * 2^e: added and subtracted, it rounds fp64 entries and low integers
  const float* factor;  // [D], fp32 only: multiplied by it, an entry is rounded to its high integer
  const double* step;   // [D], fp32 only: the value of 1 in the low integer
};

template <class T>
struct AssignProblem {
  Samples<T> samples;
  bool half;            // 16-bit rows are multiplied as stored, others relative to the offset
  Matrix high, low;     // [K, D]: centres in the type of the product; if half, high + low is the centre
  const T* centers;     // [K, D]
  const T* half_norms;  // [K]: the nearest centre has the lowest score half_norms_k - <x_i, c_k>
  const T* limits;      // [8]: coefficients of the rounding bound of the two lowest scores, as by `score_limits`
  int clusters;         // K
  int64_t* labels;      // [n]
  T* distances;         // [n]
  bool* undecided;      // [n]: within rounding the row may have another label; it is not summed
  FixedPoint<T> entries;
  double* sums;      // [blocks, K, D], added to; null: no sums
  int64_t* counts;   // [blocks, K]
  int blocks;
  int parts;         // of the centres: a block has one, of a tile of rows; 1 with sums
  T* part_scores;    // [2, parts, n], workspace: the lowest and the second lowest score in each part
  int* part_labels;  // [parts, n], workspace: of the lowest
};

// Sums of the pieces of clusters, at most 256 rows each.
template <class T>
struct PieceProblem {
  Samples<T> samples;
  FixedPoint<T> entries;
  const int64_t* order;        // [n], rows by cluster
  const int64_t *begin, *end;  // [pieces], in that order; an empty piece has begin >= end
  int64_t pieces;
  double* sums;  // [pieces, D]
};

struct JoinProblem {
  const double* pieces;        // [pieces, D]
  const int64_t *begin, *end;  // [K], the pieces of a cluster
  int64_t clusters, width;
  double* sums;  // [K, D]
};

}  // namespace mcl
