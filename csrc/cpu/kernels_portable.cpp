#define MCL_INSTRUCTION_SET portable
#include "kernels.h"
#include "vector_blocks.h"

namespace mcl {
Kernels<float> portable_float() { return portable::kernels<portable::VectorBlocks<float>>(); }
Kernels<double> portable_double() { return portable::kernels<portable::VectorBlocks<double>>(); }
}  // namespace mcl
