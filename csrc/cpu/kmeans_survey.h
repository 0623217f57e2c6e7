// The smallest and the largest entry of each column, in one read of the rows.
#pragma once

#include "kmeans_problem.h"
#include "packing.h"

namespace mcl::MCL_INSTRUCTION_SET {

template <class V, class T>
inline void widen_range(const T* const* rows, int64_t d, T* low, T* high) {
  V lowest = load<V>(low + d), highest = load<V>(high + d);
  auto is_nan = lowest != lowest;
#pragma GCC unroll 8
  for (int64_t i = 0; i < SURVEYED_AT_ONCE; i++) {
    const V x = load<V>(rows[i] + d);
    lowest = x < lowest ? x : lowest;
    highest = x > highest ? x : highest;
    is_nan = is_nan | (x != x);
  }
  const V nan = V{} + T(__builtin_nan(""));
  store(low + d, is_nan ? nan : lowest);
  store(high + d, is_nan ? nan : highest);
}

// Widens the ranges low .. high, [D] each, by rows begin .. end - 1; a column that holds NaN gets NaN. `copies`,
// [SURVEYED_AT_ONCE, D], is written if rows have to be converted.
template <class T>
void survey_rows(const Matrix& x, int64_t width, int64_t begin, int64_t end, T* low, T* high, T* copies) {
  const bool in_place = x.dtype == (sizeof(T) == 8 ? Dtype::float64 : Dtype::float32);
  for (int64_t first = begin; first < end; first += SURVEYED_AT_ONCE) {
    const T* rows[SURVEYED_AT_ONCE];
    for (int64_t i = 0; i < SURVEYED_AT_ONCE; i++) {
      const int64_t row = smaller(first + i, end - 1);  // the last row once more
      rows[i] = in_place ? reinterpret_cast<const T*>(address_of(x, row)) : copies + i * width;
      if (!in_place) copy_row(x, row, width, copies + i * width);
    }
    int64_t d = 0;
    for (; d + LANES<T> <= width; d += LANES<T>) widen_range<Vector<T>>(rows, d, low, high);
    for (; d < width; d++) widen_range<T>(rows, d, low, high);
  }
}

}  // namespace mcl::MCL_INSTRUCTION_SET
