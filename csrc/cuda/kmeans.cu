#include "launch.h"
#include "nearest_centers.cuh"
#include "range_sums.cuh"

namespace mcl {

cudaError_t nearest_centers(const NearestProblem<float>& problem, cudaStream_t stream) {
  if (!problem.half) return launch_nearest<float>(problem, stream);
  return problem.x.dtype == Dtype::bfloat16 ? launch_nearest<__nv_bfloat16>(problem, stream)
                                            : launch_nearest<__half>(problem, stream);
}

cudaError_t nearest_centers(const NearestProblem<double>& problem, cudaStream_t stream) {
  return launch_nearest<double>(problem, stream);
}

cudaError_t range_sums(const SumProblem<float>& problem, cudaStream_t stream) { return launch_sums(problem, stream); }

cudaError_t range_sums(const SumProblem<double>& problem, cudaStream_t stream) { return launch_sums(problem, stream); }

}  // namespace mcl
