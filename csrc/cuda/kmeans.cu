#include "kmeans_assign.cuh"

#include "launch.h"

namespace mcl {

cudaError_t assign_clusters(const AssignProblem<float>& problem, cudaStream_t stream) {
  if (!problem.half) return launch_assign<float>(problem, stream);
  return problem.samples.x.dtype == Dtype::bfloat16 ? launch_assign<__nv_bfloat16>(problem, stream)
                                                    : launch_assign<__half>(problem, stream);
}

cudaError_t assign_clusters(const AssignProblem<double>& problem, cudaStream_t stream) {
  return launch_assign<double>(problem, stream);
}

cudaError_t sum_pieces(const PieceProblem<float>& problem, cudaStream_t stream) {
  switch (problem.samples.x.dtype) {
    case Dtype::bfloat16: return launch_sum_pieces<__nv_bfloat16>(problem, stream);
    case Dtype::float16: return launch_sum_pieces<__half>(problem, stream);
    default: return launch_sum_pieces<float>(problem, stream);
  }
}

cudaError_t sum_pieces(const PieceProblem<double>& problem, cudaStream_t stream) {
  return launch_sum_pieces<double>(problem, stream);
}

cudaError_t join_pieces(const JoinProblem& problem, cudaStream_t stream) {
  return launch_join_pieces(problem, stream);
}

}  // namespace mcl
