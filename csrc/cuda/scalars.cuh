// Scalar types: reading, rounding and multiplication.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "matrix.h"

namespace mcl {

constexpr int WARP = 32;

// The accumulator type of products of an operand type.
template <class Operand>
struct SumOf {
  using Type = float;
};
template <>
struct SumOf<double> {
  using Type = double;
};
template <class Operand>
using Sum = typename SumOf<Operand>::Type;

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ double wide(double x) { return x; }
__device__ __forceinline__ float wide(__half x) { return __half2float(x); }
__device__ __forceinline__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class To>
__device__ __forceinline__ To rounded(double x) {
  return static_cast<To>(x);
}
template <class To>
__device__ __forceinline__ To rounded(float x) {
  return static_cast<To>(x);
}
template <>
__device__ __forceinline__ __half rounded<__half>(float x) {
  return __float2half(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 rounded<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}

// N adjacent scalars, loaded and stored at once if they are at most 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N <= 16 ? sizeof(T) * N : 16) Vector {
  T lanes[N];
};

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load(const T* from) {
  return *reinterpret_cast<const Vector<T, N>*>(from);
}

template <class To>
__device__ __forceinline__ To read(const Matrix& x, int64_t at) {
  switch (x.dtype) {
    case Dtype::float32: return rounded<To>(static_cast<Sum<To>>(static_cast<const float*>(x.data)[at]));
    case Dtype::float64: return rounded<To>(static_cast<Sum<To>>(static_cast<const double*>(x.data)[at]));
    case Dtype::bfloat16:
      return rounded<To>(static_cast<Sum<To>>(wide(static_cast<const __nv_bfloat16*>(x.data)[at])));
    default: return rounded<To>(static_cast<Sum<To>>(wide(static_cast<const __half*>(x.data)[at])));
  }
}

template <class T>
__device__ __forceinline__ void write(void* to, Dtype dtype, int64_t at, T value) {
  switch (dtype) {
    case Dtype::float32: static_cast<float*>(to)[at] = static_cast<float>(value); break;
    case Dtype::float64: static_cast<double*>(to)[at] = value; break;
    case Dtype::bfloat16:
      static_cast<__nv_bfloat16*>(to)[at] = rounded<__nv_bfloat16>(static_cast<float>(value));
      break;
    default: static_cast<__half*>(to)[at] = rounded<__half>(static_cast<float>(value));
  }
}

// A product that is never fused with a sum: a logit must have the same bits in the forward pass and in the backward
// pass, where the LSE is subtracted from it. For logits of 1e4 a fused product would differ by 5e-4.
__device__ __forceinline__ float multiply_rounded(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ double multiply_rounded(double x, double y) { return __dmul_rn(x, y); }

// Replaces an infinite maximum by 0: -inf has to stay -inf, and inf to stay inf.
template <class T>
__device__ __forceinline__ T finite_or_zero(T maximum) {
  return fabs(maximum) == static_cast<T>(INFINITY) ? T(0) : maximum;
}

}  // namespace mcl
