// The toolkit's half type, as far as the kernels need it.
#pragma once

#include "cuda_runtime.h"

struct __half {
  _Float16 value;
};

inline __half __float2half(float x) { return {static_cast<_Float16>(x)}; }
inline float __half2float(__half x) { return static_cast<float>(x.value); }
