// Products of tiles in shared memory, summed in the registers of a block's threads.
//
// Tensor cores multiply half-precision operands, 16 x 16 x 16 at a time. All others are multiplied by fused
// multiply-adds in fp32 or fp64; so is bfloat16 before sm_80, whose tensor cores lack it (as float16 it would
// overflow).
#pragma once

#include <mma.h>

#include <type_traits>

#include "scalars.cuh"

namespace mcl {

// Layout of the second factor in memory: one row for each column of the product, or for each term of the sum.
enum class Layout { rows_are_columns, rows_are_terms };

// EDGE x EDGE sums: each thread has PER_ROW x PER_COLUMN of them.
template <class Operand, int EDGE, int THREADS>
class FusedMultiplyAdds {
 public:
  using T = Sum<Operand>;

  __device__ __forceinline__ void clear() {
    for_each([&](int, int, T& sum) { sum = 0; });
  }

  // Adds the product of a, [EDGE, TERMS], and b. The terms of each part have a sum of their own, which rounds less over
  // many parts.
  template <int TERMS, Layout LAYOUT>
  __device__ __forceinline__ void add(const Operand* a, int a_stride, const Operand* b, int b_stride) {
    T part[PER_ROW][PER_COLUMN];
#pragma unroll
    for (int i = 0; i < PER_ROW; i++)
#pragma unroll
      for (int j = 0; j < PER_COLUMN; j++) part[i][j] = 0;
#pragma unroll 2
    for (int first = 0; first < TERMS; first += STEP) {
      Vector<Operand, STEP> left[PER_ROW];
#pragma unroll
      for (int i = 0; i < PER_ROW; i++) left[i] = load<STEP>(a + row(i) * a_stride + first);
      if constexpr (LAYOUT == Layout::rows_are_columns) {
#pragma unroll
        for (int j = 0; j < PER_COLUMN; j++) {
          const auto right = load<STEP>(b + column(j) * b_stride + first);
#pragma unroll
          for (int i = 0; i < PER_ROW; i++)
#pragma unroll
            for (int k = 0; k < STEP; k++) part[i][j] += wide(left[i].lanes[k]) * wide(right.lanes[k]);
        }
      } else {
#pragma unroll
        for (int k = 0; k < STEP; k++)
#pragma unroll
          for (int j = 0; j < PER_COLUMN; j++) {
            const T right = wide(b[(first + k) * b_stride + column(j)]);
#pragma unroll
            for (int i = 0; i < PER_ROW; i++) part[i][j] += wide(left[i].lanes[k]) * right;
          }
      }
    }
    for_each([&](int i, int j, T& sum) { sum += part[i][j]; });
  }

  __device__ __forceinline__ void store(T* to, int stride) {
    for_each([&](int i, int j, T& sum) { to[row(i) * stride + column(j)] = sum; });
  }

 private:
  static constexpr int LANES = 16, PER_ROW = EDGE * LANES / THREADS, PER_COLUMN = EDGE / LANES;
  static constexpr int STEP = 4;
  T sums_[PER_ROW][PER_COLUMN];

  // Adjacent lanes take adjacent columns of one row: no two lanes read different words of one bank.
  static __device__ __forceinline__ int row(int i) { return threadIdx.x / LANES + THREADS / LANES * i; }
  static __device__ __forceinline__ int column(int j) { return threadIdx.x % LANES + LANES * j; }

  template <class Body>
  __device__ __forceinline__ void for_each(Body body) {
#pragma unroll
    for (int i = 0; i < PER_ROW; i++)
#pragma unroll
      for (int j = 0; j < PER_COLUMN; j++) body(i, j, sums_[i][j]);
  }
};

// Loads a fragment from shared memory. For bfloat16, nvcc emits generic loads of 4 bytes each, unless the instruction
// names the state space: then it emits one LDSM, as for float16.
template <class Fragment, class Operand>
__device__ __forceinline__ void load_fragment(Fragment& fragment, const Operand* from, unsigned stride) {
  nvcuda::wmma::load_matrix_sync(fragment, from, stride);
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define MCL_LOAD_BF16(use, LAYOUT, operand, layout)                                                                  \
  __device__ __forceinline__ void load_fragment(                                                                     \
      nvcuda::wmma::fragment<nvcuda::wmma::use, 16, 16, 16, __nv_bfloat16, nvcuda::wmma::LAYOUT>& fragment,          \
      const __nv_bfloat16* from, unsigned stride) {                                                                  \
    static_assert(sizeof fragment.x == 16);                                                                          \
    auto* words = reinterpret_cast<unsigned*>(fragment.x);                                                           \
    asm volatile("wmma.load." operand ".sync.aligned." layout ".m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;"   \
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])                                    \
                 : "r"(unsigned(__cvta_generic_to_shared(from))), "r"(stride)                                        \
                 : "memory");                                                                                        \
  }
MCL_LOAD_BF16(matrix_a, row_major, "a", "row")
MCL_LOAD_BF16(matrix_b, col_major, "b", "col")
MCL_LOAD_BF16(matrix_b, row_major, "b", "row")
#endif

// EDGE x EDGE sums on tensor cores: each warp has FRAGMENTS_DOWN x FRAGMENTS_ACROSS fragments of them.
template <class Operand, int EDGE, int THREADS>
class TensorCores {
 public:
  __device__ __forceinline__ void clear() {
    for_each([&](int, int, auto& sum) { nvcuda::wmma::fill_fragment(sum, 0.0f); });
  }

  template <int TERMS, Layout LAYOUT>
  __device__ __forceinline__ void add(const Operand* a, int a_stride, const Operand* b, int b_stride) {
    using namespace nvcuda::wmma;
    constexpr bool BY_COLUMN = LAYOUT == Layout::rows_are_columns;
    using Left = fragment<matrix_a, FRAGMENT, FRAGMENT, FRAGMENT, Operand, row_major>;
    using RightLayout = std::conditional_t<BY_COLUMN, col_major, row_major>;
    using Right = fragment<matrix_b, FRAGMENT, FRAGMENT, FRAGMENT, Operand, RightLayout>;
#pragma unroll
    for (int first = 0; first < TERMS; first += FRAGMENT) {
      Left left[FRAGMENTS_DOWN];
#pragma unroll
      for (int i = 0; i < FRAGMENTS_DOWN; i++) load_fragment(left[i], a + row(i) * a_stride + first, a_stride);
#pragma unroll
      for (int j = 0; j < FRAGMENTS_ACROSS; j++) {
        Right right;
        load_fragment(right, BY_COLUMN ? b + column(j) * b_stride + first : b + first * b_stride + column(j),
                      b_stride);
#pragma unroll
        for (int i = 0; i < FRAGMENTS_DOWN; i++) mma_sync(sums_[i][j], left[i], right, sums_[i][j]);
      }
    }
  }

  __device__ __forceinline__ void store(float* to, int stride) {
    for_each([&](int i, int j, auto& sum) {
      nvcuda::wmma::store_matrix_sync(to + row(i) * stride + column(j), sum, stride, nvcuda::wmma::mem_row_major);
    });
  }

 private:
  static constexpr int FRAGMENT = 16, ACROSS = 2, DOWN = THREADS / WARP / ACROSS;  // ACROSS, DOWN: numbers of warps
  static constexpr int FRAGMENTS_DOWN = EDGE / DOWN / FRAGMENT, FRAGMENTS_ACROSS = EDGE / ACROSS / FRAGMENT;
  using Fragment = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, FRAGMENT, FRAGMENT, FRAGMENT, float>;
  Fragment sums_[FRAGMENTS_DOWN][FRAGMENTS_ACROSS];

  static __device__ __forceinline__ int row(int i) {
    return (threadIdx.x / WARP / ACROSS * FRAGMENTS_DOWN + i) * FRAGMENT;
  }
  static __device__ __forceinline__ int column(int j) {
    return (threadIdx.x / WARP % ACROSS * FRAGMENTS_ACROSS + j) * FRAGMENT;
  }

  template <class Body>
  __device__ __forceinline__ void for_each(Body body) {
#pragma unroll
    for (int i = 0; i < FRAGMENTS_DOWN; i++)
#pragma unroll
      for (int j = 0; j < FRAGMENTS_ACROSS; j++) body(i, j, sums_[i][j]);
  }
};

template <class Operand>
struct HasTensorCores : std::false_type {};
template <>
struct HasTensorCores<__half> : std::true_type {};
// A test of sm_75 defines MCL_NO_BF16_TENSOR_CORES.
#if (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800) && !defined(MCL_NO_BF16_TENSOR_CORES)
template <>
struct HasTensorCores<__nv_bfloat16> : std::true_type {};
#endif

template <class Operand, int EDGE, int THREADS>
using Products = std::conditional_t<HasTensorCores<Operand>::value, TensorCores<Operand, EDGE, THREADS>,
                                    FusedMultiplyAdds<Operand, EDGE, THREADS>>;

}  // namespace mcl
