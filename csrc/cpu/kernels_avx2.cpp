// The kernels, compiled for avx2.
#define MCL_INSTRUCTION_SET avx2
#include "tasks.h"

namespace mcl {
Kernels<float> avx2_float() { return avx2::kernels<float>(); }
Kernels<double> avx2_double() { return avx2::kernels<double>(); }
}  // namespace mcl
