// The kernels of the best instruction set of this processor, or of the one that MCL_KERNELS_CPU names.
#pragma once

#include <string>

#include "problem.h"

namespace mcl {

// "avx512", "avx2" or "portable". Throws std::runtime_error where MCL_KERNELS_CPU names none that runs here.
std::string instruction_set();

template <class T>
Kernels<T> choose_kernels();

}  // namespace mcl
