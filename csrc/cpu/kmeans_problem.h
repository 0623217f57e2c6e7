// Arguments of the kernels of k-means, in plain data.
#pragma once

#include "matrix.h"

namespace mcl {

constexpr int64_t SURVEYED_AT_ONCE = 8;  // rows between an update of the columns' extremes and the next
constexpr int64_t FEW = 16;         // at most this many centres are compared in registers, in one group
constexpr int64_t MAX_GROUPS = 15;  // of centres with a lower bound each

// One pass over rows [N, D]. T, the type of products and distances, is float or double.
template <class T>
struct Clusters {
  Matrix rows;
  int64_t width, centers;  // D, K
  bool cosine;             // rows are divided by their norms; centres already are
  const T* points;         // [K, D]: the centres
  int64_t levels;          // of sums
  const double* rounding;  // [levels, D]: 1.5 * 2^e, where no sum of a level's entries is above 2^e
  const double* weights;   // [N], or null: rows are summed times their weights. Sums then have D + 1 columns, as has
                           // `rounding`: the last one is the sum of the weights
  int64_t* labels;         // [N], or null
  int32_t* followed;       // [N], or null: labels of an earlier pass, -1 for none. Replaced by the labels of this pass;
                           // sums and counts then are the changes since the earlier pass
  T* distances;            // [N], to the centre of the label; NaN for a row that was not read
  float *upper, *lower;    // [N], [N, groups], or null: bounds of the distance to the centre of the label, and to the
                           // other centres of each group
  int64_t groups;          // at most MAX_GROUPS; 1 for at most FEW centres, 0 without bounds
  const int32_t* order;    // [K], the centres in the order of the groups; null: ascending
  const float* shifts;     // [K], bounds of the distances that the centres moved since; null: only set the bounds
  bool every_distance;     // find the distances of rows that keep their label, too
};

// Constants of a row's code: the row relative to the offset is scale * code + e.
template <class T>
struct RowCode {
  T squares, scale, error;  // squares: at most |x|^2 of the relative row; error: at least |e| and what products round
};

// Rows [N, D]: all rows of a matrix, or those at some positions.
template <class T>
struct SampledRows {
  const T* rows;
  int64_t row_stride;
  const int64_t* positions;  // [N], or null

  const T* at(int64_t i) const { return rows + (positions ? positions[i] : i) * row_stride; }
};

// A step of k-means++ over rows [N, D], after K centres, with L candidates for the next one, which all are rows.
template <class T>
struct Seeding {
  SampledRows<T> rows;
  const T* offset;
  int64_t width;                // D
  const int8_t* codes;          // [N, code_stride], or null
  const RowCode<T>* row_codes;  // [N]
  int64_t code_stride;
  int64_t centers, candidates;  // K, L
  const double* weights;        // [N], or null: of the rows in the gains
  const double* nearest;        // [N]: squared distance to the nearest centre, infinite without one
  const int32_t* labels;        // [N]: that centre, 0 without one
  int64_t stride;               // from one candidate to the next
  T *stored, *relative;         // [L, stride]: the candidates as stored, and relative to the offset
  double *squares, *norms;      // [L]: of the relative candidates
  double *limits, *lowest;      // [K, L], [K]: candidate l is no nearer to the rows of centre c whose squared
                                // distance to c is at most limits_cl; the lowest of the limits of c
};

constexpr int64_t SEEDING_ROWS = 256;  // rows whose gains are added up

// Numbers of rows: compared with candidates, by their codes if there are any; nearer to a candidate.
struct SeedingCounts {
  int64_t compared, nearer;
};

}  // namespace mcl
