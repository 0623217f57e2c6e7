// Types of arguments and a check that the bindings of both trees share.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "common.h"

namespace mcl {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalTensors = c10::List<OptionalTensor>;  // Tensor?[] of a schema

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::float32;
    case at::kDouble: return Dtype::float64;
    case at::kBFloat16: return Dtype::bfloat16;
    case at::kHalf: return Dtype::float16;
    default: TORCH_CHECK(false, "embeddings must be float16, bfloat16, float32 or float64: got ", x.scalar_type());
  }
}

// Tensor at a position of the list where None is not allowed.
inline Tensor required(const OptionalTensors& tensors, size_t index) {
  const OptionalTensor tensor = tensors.get(index);
  TORCH_CHECK(tensor, "tensor ", index, " of the list must be given");
  return *tensor;
}

}  // namespace mcl
