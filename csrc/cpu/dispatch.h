// Chooses the kernels of the best instruction set of this CPU, or of the one that MCL_KERNELS_CPU names.
#pragma once

#include <string>

#include "kernel_table.h"

namespace mcl {

// "amx", "avx512", "avx2" or "portable". Throws std::runtime_error if MCL_KERNELS_CPU names another one, or one that
// this CPU lacks.
std::string instruction_set();

// `bfloat16`: queries and keys both are. AMX has kernels for that case only; for all others "amx" means AVX-512.
template <class T>
Kernels<T> choose_kernels(bool bfloat16);

}  // namespace mcl
