// nvcuda::wmma, 16 x 16 x 16 with fp32 sums. The first lane of a warp holds the complete fragment and computes; the
// elements held by other lanes are undefined, as they are on a GPU. Sums are fp32 and added in order. Tensor cores add
// several products at a time and truncate them, which this does not emulate.
#pragma once

#include <type_traits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16);
  float entries[16][16];
};

inline bool is_first_lane() { return threadIdx.x % cuda_on_cpu::WARP == 0; }

template <class T>
void check_address(const T* at, unsigned stride) {
  if (reinterpret_cast<uintptr_t>(at) % 32 || stride * sizeof(T) % 16)
    cuda_on_cpu::fail("a fragment's address must be a multiple of 32 bytes, and its stride of 16");
}

inline float as_float(__half x) { return __half2float(x); }
inline float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class Fragment>
void fill_fragment(Fragment& f, float value) {
  if (is_first_lane()) std::fill_n(&f.entries[0][0], 256, value);
}

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, const T* from, unsigned stride) {
  check_address(from, stride);
  if (!is_first_lane()) return;
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++)
      f.entries[i][j] = as_float(std::is_same_v<Layout, row_major> ? from[i * stride + j] : from[j * stride + i]);
}

template <class A, class B, class C>
void mma_sync(C& result, const A& a, const B& b, const C& c) {
  if (!is_first_lane()) return;
  if (&result != &c) result = c;
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++)
      for (int j = 0; j < 16; j++) result.entries[i][j] += a.entries[i][k] * b.entries[k][j];
}

inline void store_matrix_sync(float* to, const fragment<accumulator, 16, 16, 16, float>& f, unsigned stride,
                              layout_t) {
  check_address(to, stride);
  if (!is_first_lane()) return;
  for (int i = 0; i < 16; i++) std::copy_n(f.entries[i], 16, to + i * stride);
}

}  // namespace nvcuda::wmma
