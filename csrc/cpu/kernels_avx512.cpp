#define MCL_INSTRUCTION_SET avx512
#include "kernels.h"
#include "vector_blocks.h"

namespace mcl {
Kernels<float> avx512_float() { return avx512::kernels<avx512::VectorBlocks<float>>(); }
Kernels<double> avx512_double() { return avx512::kernels<avx512::VectorBlocks<double>>(); }
}  // namespace mcl
