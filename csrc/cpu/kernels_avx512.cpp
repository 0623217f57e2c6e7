// The kernels, compiled for avx512.
#define MCL_INSTRUCTION_SET avx512
#include "tasks.h"

namespace mcl {
Kernels<float> avx512_float() { return avx512::kernels<float>(); }
Kernels<double> avx512_double() { return avx512::kernels<double>(); }
}  // namespace mcl
