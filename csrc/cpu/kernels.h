// The functions of this instruction set.
#pragma once

#include "backward.h"
#include "cluster.h"
#include "count.h"
#include "forward.h"
#include "unit_rows.h"

namespace mcl::MCL_INSTRUCTION_SET {

template <class Blocks>
Kernels<typename Blocks::Value> kernels() {
  using T = typename Blocks::Value;
  return {forward_task<Blocks>,    backward_task<Blocks>, count_task<Blocks>,
          workspace_bytes<Blocks>, unit_rows<T>,          unit_rows_backward<T>,
          packed_centers_bytes<T>, pack_centers<T>,       cluster_workspace_bytes<T>,
          cluster_rows<T>};
}

}  // namespace mcl::MCL_INSTRUCTION_SET
