#define MCL_INSTRUCTION_SET avx2
#include "kernels.h"
#include "vector_blocks.h"

namespace mcl {
Kernels<float> avx2_float() { return avx2::kernels<avx2::VectorBlocks<float>>(); }
Kernels<double> avx2_double() { return avx2::kernels<avx2::VectorBlocks<double>>(); }
}  // namespace mcl
