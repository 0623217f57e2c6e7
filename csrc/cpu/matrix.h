// Rows of a tensor in plain data. These problem headers are compiled for every instruction set, so they hold no
// function and no std type.
#pragma once

#include <cstdint>

#include "../common.h"

namespace mcl {

// [size, D] with an innermost stride of 1.
struct Matrix {
  const void* data;
  int64_t row_stride;  // in elements
  Dtype dtype;
};

}  // namespace mcl
