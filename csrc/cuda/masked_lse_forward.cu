#include "masked_lse_forward.cuh"

namespace mcl {

cudaError_t masked_lse_forward(const ForwardProblem<float>& problem, int64_t programs, const Allocate& allocate,
                               cudaStream_t stream) {
  if (!problem.pairs.half) return launch_forward<float>(problem, programs, allocate, stream);
  return problem.pairs.rows.x.dtype == Dtype::bfloat16
             ? launch_forward<__nv_bfloat16>(problem, programs, allocate, stream)
             : launch_forward<__half>(problem, programs, allocate, stream);
}

cudaError_t masked_lse_forward(const ForwardProblem<double>& problem, int64_t programs, const Allocate& allocate,
                               cudaStream_t stream) {
  return launch_forward<double>(problem, programs, allocate, stream);
}

}  // namespace mcl
