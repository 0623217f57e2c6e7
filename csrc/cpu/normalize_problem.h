// Arguments of the kernels that normalise rows, in plain data.
#pragma once

#include <cstdint>

namespace mcl {

// Two views [size, D] of the same samples; null b: a single view. The innermost strides are 1.
template <class T>
struct Views {
  const T *a, *b;
  int64_t a_stride, b_stride;  // in elements
  int64_t width;               // D
};

}  // namespace mcl
