// Tensors as the kernels take them, and the device and stream that launches use: shared by the bindings.
#pragma once

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <limits>

#include "../common_torch.h"
#include "matrix.h"

namespace mcl {

// Makes the device of a tensor the current one, and provides its current stream.
struct OnDevice {
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;

  explicit OnDevice(const Tensor& x) : guard(x.device()), stream(c10::cuda::getCurrentCUDAStream(x.device().index())) {}
};

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // clears the error: torch would raise it again at its next launch
  TORCH_CHECK(false, "impl='cuda': ", cudaGetErrorString(error));
}

template <class T>
const T* pointer(const OptionalTensor& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}
template <class T>
T* mutable_pointer(const OptionalTensor& x) {
  return x ? x->mutable_data_ptr<T>() : nullptr;
}

// Describes the rows of x for a kernel that multiplies in the type `operand`: rows of another type are read element by
// element.
inline Matrix matrix(const Tensor& x, at::ScalarType operand) {
  const bool dense = x.size(1) <= 1 || x.stride(1) == 1;
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 &&
                       x.stride(0) * x.element_size() % 16 == 0;
  return {x.const_data_ptr(), x.stride(0), x.stride(1), dtype_of(x), dense && aligned && x.scalar_type() == operand};
}

inline int checked_size(const Tensor& x) {
  constexpr int MAX_ROWS = std::numeric_limits<int>::max() - (1 << 16);  // positions past the last row must fit, too
  TORCH_CHECK(x.size(0) <= MAX_ROWS, "impl='cuda' takes at most ", MAX_ROWS, " rows: got ", x.size(0));
  return int(x.size(0));
}

}  // namespace mcl
