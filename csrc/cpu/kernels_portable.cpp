// The kernels, compiled for portable.
#define MCL_INSTRUCTION_SET portable
#include "tasks.h"

namespace mcl {
Kernels<float> portable_float() { return portable::kernels<float>(); }
Kernels<double> portable_double() { return portable::kernels<double>(); }
}  // namespace mcl
