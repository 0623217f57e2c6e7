// The launchers: what is null or of no rows is not launched, and nothing waits for the device.
#pragma once

#include <cuda_runtime.h>

#include "problem.h"

namespace mcl {

cudaError_t masked_lse_forward(const ForwardProblem<float>& problem, cudaStream_t stream);
cudaError_t masked_lse_forward(const ForwardProblem<double>& problem, cudaStream_t stream);

cudaError_t masked_lse_backward(const BackwardProblem<float>& problem, cudaStream_t stream);
cudaError_t masked_lse_backward(const BackwardProblem<double>& problem, cudaStream_t stream);

cudaError_t make_plan(const PlanProblem& problem, cudaStream_t stream);
cudaError_t find_dropped(const DropProblem& problem, cudaStream_t stream);

cudaError_t nearest_centers(const NearestProblem<float>& problem, cudaStream_t stream);
cudaError_t nearest_centers(const NearestProblem<double>& problem, cudaStream_t stream);

cudaError_t range_sums(const SumProblem<float>& problem, cudaStream_t stream);
cudaError_t range_sums(const SumProblem<double>& problem, cudaStream_t stream);

}  // namespace mcl
