// Number of kept pairs of each row with not (<q_i, k_j> <= threshold_i), so that NaN counts as above.
#pragma once

#include "task_walk.h"

namespace mcl::MCL_INSTRUCTION_SET {

template <class Blocks>
void count_task(const Problem<typename Blocks::Value>& problem, const Task& task, char* workspace) {
  using T = typename Blocks::Value;
  Arena arena(workspace);
  Walk<Blocks> walk(problem, task, arena);
  walk.for_each_tile([&](const Tile& tile) {
    for (int64_t i = 0; i < tile.rows; i++) {
      const T* products = walk.tile_row(i);
      const Vector<T> threshold = broadcast(problem.threshold[walk.query_row(tile.row + i)]);
      Vector<T> above{};
      walk.kept_columns(tile, i).for_each_vector([&](int64_t j, auto kept) {
        const Vector<T> one = load<Vector<T>>(products + j) <= threshold ? Vector<T>{} : broadcast(T(1));
        above += where<T>(kept, one, 0);
      });
      problem.count[walk.query_row(tile.row + i)] += int64_t(sum_lanes<T>(above));
    }
  });
}

}  // namespace mcl::MCL_INSTRUCTION_SET
