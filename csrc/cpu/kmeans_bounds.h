// Bounds that prove that a row keeps its label without reading the row: its distance to the centre of its label is at
// most `upper`, that to every other centre of a group at least the group's `lower`. A centre that moves by s changes a
// distance by at most s. With one group they are Hamerly's (2010), with several those of Yinyang k-means (Ding et al.
// 2015). Bounds are widened past rounding, so that they decide as the distances would.
#pragma once

#include "kmeans_centers.h"

namespace mcl::MCL_INSTRUCTION_SET {

constexpr int64_t SELECTED_ROWS = 3072;                      // rows that are selected at a time
constexpr float ABOVE = 1 + 0x1p-21f, BELOW = 1 - 0x1p-21f;  // factors past the rounding of a bound
constexpr float MIN_GAP = 0x1p-100f;                         // past the rounding of the smallest bounds
constexpr float MAX_BOUND = 0x1p127f;

// Moves the bounds of a row by the shifts of the centres. Returns whether they prove that it keeps its label.
template <class T>
bool move_bounds(const Clusters<T>& clusters, const GroupShifts& shifts, int64_t row) {
  const int64_t label = clusters.followed[row];
  if (label < 0) return false;
  const float upper = (clusters.upper[row] + clusters.shifts[label]) * ABOVE;
  float* lower = clusters.lower + row * clusters.groups;
  float least = MAX_BOUND;
  for (int64_t g = 0; g < clusters.groups; g++) {
    lower[g] = (lower[g] - (label == shifts.farthest[g] ? shifts.other[g] : shifts.largest[g])) * BELOW;
    least = smaller(least, lower[g]);
  }
  clusters.upper[row] = upper;
  return upper + MIN_GAP < least;
}

// Writes those of rows begin .. end - 1 to `selected` whose distances have to be found, and NaN to the distances of the
// others. Returns their number.
template <class T>
int64_t select_rows(const Clusters<T>& clusters, const GroupShifts& shifts, int64_t begin, int64_t end,
                    int64_t* selected) {
  int64_t count = 0;
  for (int64_t row = begin; row < end; row++) {
    const bool keeps = clusters.shifts && move_bounds(clusters, shifts, row);
    selected[count] = row;
    count += !keeps || clusters.every_distance;
    if (keeps) clusters.distances[row] = T(__builtin_nan(""));
  }
  return count;
}

// The errors of a row's bounds: relative, of sums of D squares; and of the rounding of a row and a centre relative to
// the offset, for cosine to unit length.
struct BoundErrors {
  double relative, operand;

  template <class T>
  static BoundErrors of(const Clusters<T>& clusters, const PackedCenters<T>& centers, T squares) {
    const double relative = (clusters.width / LANES<T> + 8) * double(ROUNDING<T>);
    return {relative, relative * (__builtin_sqrt(double(squares)) + double(*centers.largest_norm))};
  }
};

// The upper bound from the distance to the centre of the label, which is off by at most `error`.
template <class T>
float upper_bound(const Clusters<T>& clusters, const BoundErrors& errors, T squares, T distance, T error) {
  if (clusters.cosine && squares == 0) return __builtin_inff();  // without a direction: distances are 1 by definition
  const double squared = (double(distance) + double(error)) * (clusters.cosine ? 2 : 1);
  return float(__builtin_sqrt(squared) * (1 + 2 * errors.relative) + errors.operand) * ABOVE;
}

// The lower bound from a score that no centre is below.
template <class T>
float lower_bound(const Clusters<T>& clusters, const BoundErrors& errors, T squares, T score) {
  const double norm = clusters.cosine ? 1 : double(squares) / 2 * (1 - 2 * errors.relative);
  const double half = norm + double(score);  // of the squared distance
  const double lower = (half > 0 ? __builtin_sqrt(2 * half) : 0) - errors.operand;
  return lower < double(MAX_BOUND) ? float(lower) * BELOW : MAX_BOUND;
}

// Lowers the upper bound of a row to its distance from the centre of its label. Returns a bit for each group of centres
// that may then be nearer, and for that of the label; 0 if the row keeps its label.
template <class T>
uint32_t tighten_bounds(const Clusters<T>& clusters, const PackedCenters<T>& centers, int64_t row, T squares,
                        T distance) {
  const float upper =
      upper_bound(clusters, BoundErrors::of(clusters, centers, squares), squares, distance, T(0));
  clusters.upper[row] = upper;
  uint32_t needed = 0;
  for (int64_t g = 0; g < clusters.groups; g++)
    if (!(upper + MIN_GAP < clusters.lower[row * clusters.groups + g])) needed |= uint32_t(1) << g;
  return needed ? needed | uint32_t(1) << centers.group_of[clusters.followed[row]] : 0;
}

}  // namespace mcl::MCL_INSTRUCTION_SET
