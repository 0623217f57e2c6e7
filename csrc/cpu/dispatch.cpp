#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mcl {

Kernels<float> portable_float();
Kernels<double> portable_double();
#if defined(__x86_64__)
Kernels<float> amx_bfloat16();
Kernels<float> avx512_float();
Kernels<double> avx512_double();
Kernels<float> avx2_float();
Kernels<double> avx2_double();
#endif

namespace {

#if defined(__x86_64__)
// Returns whether this process may use the matrix registers: Linux saves them only after a request.
bool request_matrix_unit() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bfloat16_products = d >> 22 & 1, registers = d >> 24 & 1;
  if (!bfloat16_products || !registers || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  const bool bfloat16_rounding = a >> 5 & 1;
  constexpr int REQUEST_PERMISSION = 0x1023, MATRIX_REGISTERS = 18;
  return bfloat16_rounding && syscall(SYS_arch_prctl, REQUEST_PERMISSION, MATRIX_REGISTERS) == 0;
#else
  return false;
#endif
}
#endif

bool runs_here(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool amx = avx512 && request_matrix_unit();
  if (name == "amx") return amx;
  if (name == "avx512") return avx512;
  if (name == "avx2") return avx2;
#endif
  return name == "portable";
}

}  // namespace

std::string instruction_set() {
  const char* forced = std::getenv("MCL_KERNELS_CPU");
  if (forced && *forced) {
    if (!runs_here(forced))
      throw std::runtime_error(
          "MCL_KERNELS_CPU must be amx, avx512, avx2 or portable, and run on this CPU: got " +
          std::string(forced));
    return forced;
  }
  for (const char* name : {"amx", "avx512", "avx2"})
    if (runs_here(name)) return name;
  return "portable";
}

template <>
Kernels<float> choose_kernels<float>(bool bfloat16) {
  const std::string name = instruction_set();
#if defined(__x86_64__)
  if (name == "amx" && bfloat16) return amx_bfloat16();
  if (name == "amx" || name == "avx512") return avx512_float();
  if (name == "avx2") return avx2_float();
#endif
  return portable_float();
}

template <>
Kernels<double> choose_kernels<double>(bool) {
  const std::string name = instruction_set();
#if defined(__x86_64__)
  if (name == "amx" || name == "avx512") return avx512_double();
  if (name == "avx2") return avx2_double();
#endif
  return portable_double();
}

}  // namespace mcl
