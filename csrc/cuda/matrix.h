// Rows of a tensor in plain data.
#pragma once

#include <cstdint>

#include "../common.h"

namespace mcl {

// [size, D], any strides, in elements.
struct Matrix {
  const void* data;
  int64_t row_stride, step;
  Dtype dtype;
  bool in_vectors;  // rows are dense, and start at multiples of 16 bytes
};

}  // namespace mcl
