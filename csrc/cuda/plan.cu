#include "plan.cuh"

#include "launch.h"

namespace mcl {

cudaError_t make_plan(const PlanProblem& problem, cudaStream_t stream) { return launch_plan(problem, stream); }

cudaError_t find_dropped(const DropProblem& problem, cudaStream_t stream) {
  return launch_find_dropped(problem, stream);
}

}  // namespace mcl
