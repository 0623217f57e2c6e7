#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace mcl {

Kernels<float> portable_float();
Kernels<double> portable_double();
#if defined(__x86_64__)
Kernels<float> avx512_float();
Kernels<double> avx512_double();
Kernels<float> avx2_float();
Kernels<double> avx2_double();
#endif

namespace {

bool runs_here(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (name == "avx2") return avx2;
  if (name == "avx512")
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return name == "portable";
}

}  // namespace

std::string instruction_set() {
  const char* forced = std::getenv("MCL_KERNELS_CPU");
  if (forced && *forced) {
    if (!runs_here(forced))
      throw std::runtime_error("MCL_KERNELS_CPU must be avx512, avx2 or portable, and run on this processor: got " +
                               std::string(forced));
    return forced;
  }
  for (const char* name : {"avx512", "avx2"})
    if (runs_here(name)) return name;
  return "portable";
}

template <>
Kernels<float> choose_kernels<float>() {
  const std::string name = instruction_set();
#if defined(__x86_64__)
  if (name == "avx512") return avx512_float();
  if (name == "avx2") return avx2_float();
#endif
  return portable_float();
}

template <>
Kernels<double> choose_kernels<double>() {
  const std::string name = instruction_set();
#if defined(__x86_64__)
  if (name == "avx512") return avx512_double();
  if (name == "avx2") return avx2_double();
#endif
  return portable_double();
}

}  // namespace mcl
