#include "count_units.cuh"

namespace mcl {

cudaError_t count_units(UnitProblem& problem, const Allocate& allocate, cudaStream_t stream) {
  return launch_count_units(problem, allocate, stream);
}

}  // namespace mcl
