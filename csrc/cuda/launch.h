// The launchers. They return without a launch if there are no rows, and never wait for the device.
#pragma once

#include <cuda_runtime.h>

#include "kmeans_problem.h"
#include "masked_lse_problem.h"
#include "plan_problem.h"

namespace mcl {

// `programs`: the number of programs that share the work, 0 for as many as the device holds at once.
cudaError_t masked_lse_forward(const ForwardProblem<float>& problem, int64_t programs, const Allocate& allocate,
                               cudaStream_t stream);
cudaError_t masked_lse_forward(const ForwardProblem<double>& problem, int64_t programs, const Allocate& allocate,
                               cudaStream_t stream);

cudaError_t masked_lse_backward(const BackwardProblem<float>& problem, int64_t programs, const Allocate& allocate,
                                cudaStream_t stream);
cudaError_t masked_lse_backward(const BackwardProblem<double>& problem, int64_t programs, const Allocate& allocate,
                                cudaStream_t stream);

// Allocates and writes the work list of the problem.
cudaError_t count_units(UnitProblem& problem, const Allocate& allocate, cudaStream_t stream);

cudaError_t make_plan(const PlanProblem& problem, cudaStream_t stream);
cudaError_t find_dropped(const DropProblem& problem, cudaStream_t stream);

cudaError_t assign_clusters(const AssignProblem<float>& problem, cudaStream_t stream);
cudaError_t assign_clusters(const AssignProblem<double>& problem, cudaStream_t stream);

cudaError_t sum_pieces(const PieceProblem<float>& problem, cudaStream_t stream);
cudaError_t sum_pieces(const PieceProblem<double>& problem, cudaStream_t stream);

cudaError_t join_pieces(const JoinProblem& problem, cudaStream_t stream);

}  // namespace mcl
