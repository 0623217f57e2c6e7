// The kernel table of the instruction set that the including file is compiled for.
#pragma once

#include "kernel_table.h"
#include "kmeans_assign.h"
#include "kmeans_plusplus.h"
#include "kmeans_survey.h"
#include "masked_lse_backward.h"
#include "masked_lse_count.h"
#include "masked_lse_forward.h"
#include "normalize.h"

namespace mcl::MCL_INSTRUCTION_SET {

template <class Blocks>
Kernels<typename Blocks::Value> kernels() {
  using T = typename Blocks::Value;
  return {forward_task<Blocks>,    backward_task<Blocks>, count_task<Blocks>,
          workspace_bytes<Blocks>, unit_rows<T>,          unit_rows_backward<T>,
          survey_rows<T>,          packed_centers_bytes<T>, pack_centers<T>,
          cluster_workspace_bytes<T>, cluster_rows<T>,
          code_rows<T>,            seeding_stride<T>,     begin_seeding_step<T>,
          compare_with_candidates<T>};
}

}  // namespace mcl::MCL_INSTRUCTION_SET
