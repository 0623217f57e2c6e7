// The functions of this instruction set.
#pragma once

#include "backward.h"
#include "count.h"
#include "forward.h"

namespace mcl::MCL_INSTRUCTION_SET {

template <class Blocks>
Kernels<typename Blocks::Value> kernels() {
  return {forward_task<Blocks>, backward_task<Blocks>, count_task<Blocks>, workspace_bytes<Blocks>};
}

}  // namespace mcl::MCL_INSTRUCTION_SET
