// The kernels of the best instruction set of this processor, or of the one that MCL_KERNELS_CPU names.
#pragma once

#include <string>

#include "problem.h"

namespace mcl {

// "amx", "avx512", "avx2" or "portable". Throws std::runtime_error where MCL_KERNELS_CPU names none that runs here.
std::string instruction_set();

// `bfloat16`: both queries and keys are. With AMX these have kernels of their own; all else is AVX-512 there.
template <class T>
Kernels<T> choose_kernels(bool bfloat16);

}  // namespace mcl
