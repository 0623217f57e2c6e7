#include "masked_lse_backward.cuh"

#include "launch.h"

namespace mcl {

cudaError_t masked_lse_backward(const BackwardProblem<float>& problem, cudaStream_t stream) {
  if (!problem.pairs.half) return launch_backward<float>(problem, stream);
  return problem.pairs.rows.x.dtype == Dtype::bfloat16 ? launch_backward<__nv_bfloat16>(problem, stream)
                                                       : launch_backward<__half>(problem, stream);
}

cudaError_t masked_lse_backward(const BackwardProblem<double>& problem, cudaStream_t stream) {
  return launch_backward<double>(problem, stream);
}

}  // namespace mcl
