// The launchers. They return without a launch if there are no rows, and never wait for the device.
#pragma once

#include <cuda_runtime.h>

#include "kmeans_problem.h"
#include "masked_lse_problem.h"
#include "plan_problem.h"

namespace mcl {

cudaError_t masked_lse_forward(const ForwardProblem<float>& problem, cudaStream_t stream);
cudaError_t masked_lse_forward(const ForwardProblem<double>& problem, cudaStream_t stream);

cudaError_t masked_lse_backward(const BackwardProblem<float>& problem, cudaStream_t stream);
cudaError_t masked_lse_backward(const BackwardProblem<double>& problem, cudaStream_t stream);

cudaError_t make_plan(const PlanProblem& problem, cudaStream_t stream);
cudaError_t find_dropped(const DropProblem& problem, cudaStream_t stream);

cudaError_t assign_clusters(const AssignProblem<float>& problem, cudaStream_t stream);
cudaError_t assign_clusters(const AssignProblem<double>& problem, cudaStream_t stream);

cudaError_t sum_pieces(const PieceProblem<float>& problem, cudaStream_t stream);
cudaError_t sum_pieces(const PieceProblem<double>& problem, cudaStream_t stream);

cudaError_t join_pieces(const JoinProblem& problem, cudaStream_t stream);

}  // namespace mcl
