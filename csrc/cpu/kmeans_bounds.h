// Bounds that prove that a row keeps its label without reading the row (Hamerly 2010): its distance to the centre of its
// label is at most `upper`, that to every other centre at least `lower`. A centre that moves by s changes a distance by
// at most s. Bounds are widened past rounding, so that they decide as the distances would.
#pragma once

#include "kmeans_centers.h"

namespace mcl::MCL_INSTRUCTION_SET {

constexpr int64_t SELECTED_ROWS = 768;         // rows that are selected at a time
constexpr float ABOVE = 1 + 0x1p-21f, BELOW = 1 - 0x1p-21f;  // factors past the rounding of a bound
constexpr float MIN_GAP = 0x1p-100f;           // past the rounding of bounds near the smallest numbers
constexpr float MAX_BOUND = 0x1p127f;

// Moves the bounds of a row by the shifts of the centres. Returns whether they prove that it keeps its label.
template <class T>
bool move_bounds(const Clusters<T>& clusters, int64_t row) {
  const int64_t label = clusters.followed[row];
  if (label < 0) return false;
  const float shift = label == clusters.farthest ? clusters.other_shift : clusters.largest_shift;
  const float upper = (clusters.upper[row] + clusters.shifts[label]) * ABOVE;
  const float lower = (clusters.lower[row] - shift) * BELOW;
  clusters.upper[row] = upper;
  clusters.lower[row] = lower;
  return upper + MIN_GAP < lower;
}

// Writes those of rows begin .. end - 1 to `selected` whose distances have to be found, and NaN to the distances of the
// others. Returns their number.
template <class T>
int64_t select_rows(const Clusters<T>& clusters, int64_t begin, int64_t end, int64_t* selected) {
  int64_t count = 0;
  for (int64_t row = begin; row < end; row++) {
    const bool keeps = clusters.shifts && move_bounds(clusters, row);
    selected[count] = row;
    count += !keeps || clusters.every_distance;
    if (keeps) clusters.distances[row] = T(__builtin_nan(""));
  }
  return count;
}

// Relative error of sums of D squares, and the rounding of a row and a centre relative to the offset: to fp32, and for
// cosine to unit length.
template <class T>
struct BoundErrors {
  double relative, operand;

  BoundErrors(const Clusters<T>& clusters, const PackedCenters<T>& centers, T squares)
      : relative((clusters.width / LANES<T> + 8) * double(ROUNDING<T>)),
        operand(relative * (__builtin_sqrt(double(squares)) + double(*centers.largest_norm))) {}
};

// The upper bound from the distance of a row to the centre of its label, which is off by at most `error`.
template <class T>
float upper_bound(const Clusters<T>& clusters, const BoundErrors<T>& errors, T distance, T error) {
  const double squared = (double(distance) + double(error)) * (clusters.cosine ? 2 : 1);
  return float(__builtin_sqrt(squared) * (1 + 2 * errors.relative) + errors.operand) * ABOVE;
}

// Sets the bounds of a row. `decided`: its label did not depend on rounding. `score` bounds the scores of all other
// centres from below.
template <class T>
void set_bounds(const Clusters<T>& clusters, const PackedCenters<T>& centers, int64_t row, T squares, T distance,
                T error, bool decided, T score) {
  const BoundErrors<T> errors(clusters, centers, squares);
  const double norm = clusters.cosine ? 1 : double(squares) / 2 * (1 - 2 * errors.relative);
  const double half = norm + double(score);  // of the squared distance
  const double lower = (half > 0 ? __builtin_sqrt(2 * half) : 0) - errors.operand;
  const bool has_direction = !clusters.cosine || squares != 0;
  clusters.upper[row] =
      decided && has_direction ? upper_bound(clusters, errors, distance, error) : __builtin_inff();
  clusters.lower[row] = lower < double(MAX_BOUND) ? float(lower) * BELOW : MAX_BOUND;
}

// Lowers the upper bound of a row to its distance from the centre of its label. Returns whether the bounds then prove
// that it keeps the label.
template <class T>
bool tighten_bounds(const Clusters<T>& clusters, const PackedCenters<T>& centers, int64_t row, T squares, T distance) {
  if (clusters.cosine && squares == 0) return false;
  clusters.upper[row] = upper_bound(clusters, BoundErrors<T>(clusters, centers, squares), distance, T(0));
  return clusters.upper[row] + MIN_GAP < clusters.lower[row];
}

}  // namespace mcl::MCL_INSTRUCTION_SET
