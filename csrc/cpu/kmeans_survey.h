// The smallest and the largest entry of each column, and its smallest nonzero distance to a value, in one read of the
// rows.
#pragma once

#include "kmeans_problem.h"
#include "packing.h"

namespace mcl::MCL_INSTRUCTION_SET {

template <class V>
inline V magnitude(V x) {
  return x < 0 ? -x : x;
}

// `found` is [3, D]: lowest, highest, nearest.
template <class V, bool DISTANCES, class T>
inline void widen_range(const T* const* rows, const T* middle, int64_t d, int64_t width, T* found) {
  V lowest = load<V>(found + d), highest = load<V>(found + width + d), nearest{}, value{};
  if (DISTANCES) nearest = load<V>(found + 2 * width + d), value = load<V>(middle + d);
  auto is_nan = lowest != lowest;
#pragma GCC unroll 8
  for (int64_t i = 0; i < SURVEYED_AT_ONCE; i++) {
    const V x = load<V>(rows[i] + d);
    lowest = x < lowest ? x : lowest;
    highest = x > highest ? x : highest;
    is_nan = is_nan | (x != x);
    if (!DISTANCES) continue;
    const V distance = magnitude(x - value);
    nearest = (distance > 0) & (distance < nearest) ? distance : nearest;
  }
  const V nan = V{} + T(__builtin_nan(""));
  store(found + d, is_nan ? nan : lowest);
  store(found + width + d, is_nan ? nan : highest);
  if (DISTANCES) store(found + 2 * width + d, nearest);
}

template <bool DISTANCES, class T>
void widen_ranges(const T* const* rows, const T* middle, int64_t width, T* found) {
  int64_t d = 0;
  for (; d + LANES<T> <= width; d += LANES<T>) widen_range<Vector<T>, DISTANCES>(rows, middle, d, width, found);
  for (; d < width; d++) widen_range<T, DISTANCES>(rows, middle, d, width, found);
}

// Widens the ranges `found`, [3, D], by rows begin .. end - 1; a column that holds NaN gets NaN. Distances are to
// `middle`, [D], NaN for a column without a value; null: none. `copies`, [SURVEYED_AT_ONCE, D], is written if rows have
// to be converted.
template <class T>
void survey_rows(const Matrix& x, const T* middle, int64_t width, int64_t begin, int64_t end, T* found, T* copies) {
  const bool in_place = x.dtype == (sizeof(T) == 8 ? Dtype::float64 : Dtype::float32);
  for (int64_t first = begin; first < end; first += SURVEYED_AT_ONCE) {
    const T* rows[SURVEYED_AT_ONCE];
    for (int64_t i = 0; i < SURVEYED_AT_ONCE; i++) {
      const int64_t row = smaller(first + i, end - 1);  // the last row once more
      rows[i] = in_place ? reinterpret_cast<const T*>(address_of(x, row)) : copies + i * width;
      if (!in_place) copy_row(x, row, width, copies + i * width);
    }
    if (middle)
      widen_ranges<true>(rows, middle, width, found);
    else
      widen_ranges<false>(rows, middle, width, found);
  }
}

}  // namespace mcl::MCL_INSTRUCTION_SET
