#include "masked_lse_forward.cuh"

#include "launch.h"

namespace mcl {

cudaError_t masked_lse_forward(const ForwardProblem<float>& problem, cudaStream_t stream) {
  if (!problem.pairs.half) return launch_forward<float>(problem, stream);
  return problem.pairs.rows.x.dtype == Dtype::bfloat16 ? launch_forward<__nv_bfloat16>(problem, stream)
                                                       : launch_forward<__half>(problem, stream);
}

cudaError_t masked_lse_forward(const ForwardProblem<double>& problem, cudaStream_t stream) {
  return launch_forward<double>(problem, stream);
}

}  // namespace mcl
