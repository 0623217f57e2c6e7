#define MCL_INSTRUCTION_SET amx
#include "kernels.h"
#include "matrix_blocks.h"

namespace mcl {
Kernels<float> amx_bfloat16() { return amx::kernels<amx::MatrixBlocks>(); }
}  // namespace mcl
