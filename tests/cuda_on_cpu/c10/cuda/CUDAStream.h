// Torch's current stream, which is always null here.
#pragma once

#include <c10/core/Device.h>

#include "../../cuda_runtime.h"

namespace c10::cuda {

inline cudaStream_t getCurrentCUDAStream(DeviceIndex) { return nullptr; }

}  // namespace c10::cuda
