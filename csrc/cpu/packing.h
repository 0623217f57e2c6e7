// Packs rows of any dtype in sorted order, as rows and as columns.
#pragma once

#include "masked_lse_problem.h"
#include "product.h"

namespace mcl::MCL_INSTRUCTION_SET {

inline float from_bfloat16(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
}

inline float from_float16(uint16_t bits) {
  // Exponent and mantissa are shifted into position and multiplied by 2^112, which is right for subnormals too.
  // Infinity and NaN follow.
  const uint32_t magnitude = uint32_t(bits & 0x7fff) << 13, sign = uint32_t(bits & 0x8000) << 16;
  float scaled;
  __builtin_memcpy(&scaled, &magnitude, sizeof scaled);
  scaled *= 0x1p112f;
  uint32_t word;
  __builtin_memcpy(&word, &scaled, sizeof word);
  word = (magnitude >= 0x0f800000u ? word | 0x7f800000u : word) | sign;
  __builtin_memcpy(&scaled, &word, sizeof scaled);
  return scaled;
}

template <class T>
void copy_row(const Matrix& x, int64_t row, int64_t width, T* to) {
  const int64_t offset = row * x.row_stride;
  switch (x.dtype) {
    case Dtype::float32: {
      const float* from = static_cast<const float*>(x.data) + offset;
      for (int64_t d = 0; d < width; d++) to[d] = from[d];
      break;
    }
    case Dtype::float64: {
      const double* from = static_cast<const double*>(x.data) + offset;
      for (int64_t d = 0; d < width; d++) to[d] = from[d];
      break;
    }
    case Dtype::bfloat16: {
      const uint16_t* from = static_cast<const uint16_t*>(x.data) + offset;
      for (int64_t d = 0; d < width; d++) to[d] = from_bfloat16(from[d]);
      break;
    }
    case Dtype::float16: {
      const uint16_t* from = static_cast<const uint16_t*>(x.data) + offset;
      for (int64_t d = 0; d < width; d++) to[d] = from_float16(from[d]);
      break;
    }
  }
}

// Sorted rows are scattered in memory, so they are prefetched this many rows ahead.
constexpr int64_t PREFETCH_ROWS = 4;

inline int64_t element_bytes(const Matrix& x) {
  return x.dtype == Dtype::float64 ? 8 : x.dtype == Dtype::float32 ? 4 : 2;
}

inline const char* address_of(const Matrix& x, int64_t row) {
  return static_cast<const char*>(x.data) + row * x.row_stride * element_bytes(x);
}

inline void prefetch_row(const Matrix& x, int64_t row, int64_t width) {
  const char* from = address_of(x, row);
  for (int64_t byte = 0; byte < width * element_bytes(x); byte += 64) __builtin_prefetch(from + byte);
}

// Packs rows begin .. begin + count - 1 of the sorted side. Returns their largest squared norm, NaN if one is NaN.
template <class T>
T pack_rows(const Side& side, int64_t begin, int64_t count, int64_t width, int64_t stride, T* to) {
  T largest = 0;
  for (int64_t r = 0; r < count; r++) {
    T* row = to + r * stride;
    if (r + PREFETCH_ROWS < count) prefetch_row(side.rows, side.order[begin + r + PREFETCH_ROWS], width);
    copy_row(side.rows, side.order[begin + r], width, row);
    for (int64_t d = width; d < stride; d++) row[d] = 0;
    const T norm = dot(row, row, stride);
    largest = norm <= largest || largest != largest ? largest : norm;
  }
  // Rows are multiplied in full groups and transposed in full vectors.
  const int64_t padded = larger(round_up(count, GROUP), round_up(count, LANES<T>));
  __builtin_memset(to + count * stride, 0, (padded - count) * stride * sizeof(T));
  return largest;
}

// Transposes LANES x LANES values: rows of `from` become columns of `to`.
template <class T>
inline void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  Vector<T> rows[LANES<T>], mixed[LANES<T>];
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES<T>; i++) rows[i] = load<Vector<T>>(from + i * from_stride);
  // Each step interleaves the first half of the rows with the second.
#pragma GCC unroll 4
  for (int64_t step = 1; step < LANES<T>; step *= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < LANES<T> / 2; i++) {
      mixed[2 * i] = interleave<T, 0>(rows[i], rows[i + LANES<T> / 2]);
      mixed[2 * i + 1] = interleave<T, 1>(rows[i], rows[i + LANES<T> / 2]);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES<T>; i++) rows[i] = mixed[i];
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES<T>; i++) store(to + i * to_stride, rows[i]);
}

// Packs rows as columns, in panels [width, PANEL]. The last panel is written up to its last full vector of columns.
template <class T>
void pack_panels(const T* rows, int64_t count, int64_t width, int64_t stride, T* panels) {
  for (int64_t first = 0; first < count; first += PANEL<T>) {
    T* panel = panels + first * stride;
    for (int64_t d = 0; d < width; d += LANES<T>)
      for (int64_t j = 0; j < smaller(PANEL<T>, count - first); j += LANES<T>)
        transpose_square(rows + (first + j) * stride + d, stride, panel + d * PANEL<T> + j, PANEL<T>);
  }
}

}  // namespace mcl::MCL_INSTRUCTION_SET
