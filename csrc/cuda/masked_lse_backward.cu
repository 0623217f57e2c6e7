#include "masked_lse_backward.cuh"

namespace mcl {

cudaError_t masked_lse_backward(const BackwardProblem<float>& problem, int64_t programs, const Allocate& allocate,
                                cudaStream_t stream) {
  if (!problem.pairs.half) return launch_backward<float>(problem, programs, allocate, stream);
  return problem.pairs.rows.x.dtype == Dtype::bfloat16
             ? launch_backward<__nv_bfloat16>(problem, programs, allocate, stream)
             : launch_backward<__half>(problem, programs, allocate, stream);
}

cudaError_t masked_lse_backward(const BackwardProblem<double>& problem, int64_t programs, const Allocate& allocate,
                                cudaStream_t stream) {
  return launch_backward<double>(problem, programs, allocate, stream);
}

}  // namespace mcl
