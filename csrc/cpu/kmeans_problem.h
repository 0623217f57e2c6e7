// Arguments of the kernels of k-means, in plain data.
#pragma once

#include "matrix.h"

namespace mcl {

constexpr int64_t MAX_GROUPS = 16;

// One pass over rows [N, D]. T, the type of products and distances, is float or double.
template <class T>
struct Clusters {
  Matrix rows;
  int64_t width, centers;  // D, K
  bool cosine;             // rows are divided by their norms; centres already are
  const T* points;         // [K, D]: the centres
  int64_t levels;          // of sums
  const double* rounding;  // [levels, D]: 1.5 * 2^e, where no sum of a level's entries is above 2^e
  int64_t* labels;         // [N], or null
  int32_t* followed;       // [N], or null: labels of an earlier pass, -1 for none. Replaced by the labels of this pass;
                           // sums and counts then are the changes since the earlier pass
  T* distances;            // [N], to the centre of the label; NaN for a row that was not read
  float *upper, *lower;    // [N], [N, groups], or null: bounds of the distance to the centre of the label, and to the
                           // other centres of each group
  int64_t groups;          // at most MAX_GROUPS; 1 for at most FEW centres
  const float* shifts;     // [K], bounds of the distances that the centres moved since; null: only set the bounds
  bool every_distance;     // find the distances of rows that keep their label, too
};

}  // namespace mcl
