// Walks one task, a block of sorted queries against a block of sorted keys, in tiles that stay in the cache.
//
// A task packs its blocks once, with rows in sorted order, and the keys of a tile also as columns. A task adds in a
// fixed order, so a sum depends only on the order of the tasks that share its block.
#pragma once

#include "arena.h"
#include "kept_columns.h"

namespace mcl::MCL_INSTRUCTION_SET {

// Blocks is VectorBlocks or MatrixBlocks: the packed rows and their products.
template <class Blocks>
class Walk {
 public:
  using T = typename Blocks::Value;
  const Problem<T>& problem;
  const Task& task;
  T* tile_memory;
  T largest_product;  // upper bound of |<q_i, k_j>|; NaN if an input is NaN

  Walk(const Problem<T>& problem, const Task& task, Arena& arena)
      : problem(problem),
        task(task),
        tile_memory(arena.take<T>(TILE * TILE_STRIDE<T>)),
        blocks_(arena, problem.width, task.rows, task.columns),
        one_factor_(problem.scale && problem.scale_stride == 0 ? *problem.scale : T(1)) {
    largest_product = blocks_.pack(problem, task);
  }

  int64_t query_row(int64_t i) const { return problem.query.order[task.row_begin + i]; }
  T scale(int64_t i) const { return problem.scale[query_row(i) * problem.scale_stride]; }
  Factor<T> factor(int64_t i) const { return problem.scale_stride ? Factor<T>(scale(i)) : one_factor_; }

  // Products of the tile's row i, later its logits or weights.
  T* tile_row(int64_t i) const { return tile_memory + i * TILE_STRIDE<T>; }

  KeptColumns<T> kept_columns(const Tile& tile, int64_t i) const {
    if (tile.complete) return {0, tile.columns, 0, 0, nullptr, 0};
    const int64_t begin = task.column_begin + tile.column, row = task.row_begin + tile.row + i;
    KeptColumns<T> kept{0, tile.columns, problem.drop_begin[row] - begin, problem.drop_end[row] - begin, nullptr, 0};
    // Clamped to the tile: larger positions may not fit the integers of a mask.
    kept.drop_begin = larger<int64_t>(0, smaller(kept.drop_begin, tile.columns));
    kept.drop_end = larger<int64_t>(0, smaller(kept.drop_end, tile.columns));
    if (task.diagonal) {
      // The row's own range includes the row itself. Pairs to its left are visited as columns of earlier rows.
      kept.drop_begin = 0;
      kept.start = kept.drop_end / LANES<T> * LANES<T>;
    }
    if (problem.query.code) {
      kept.code = problem.query.code[row];
      kept.codes = problem.key.code + begin;
    }
    return kept;
  }

  // Computes the products of each tile that may hold a kept pair, and calls visit(tile).
  template <class Visit>
  void for_each_tile(Visit visit) {
    for (int64_t column = 0; column < task.columns; column += TILE) {
      const int64_t columns = smaller(TILE, task.columns - column);
      const int64_t last_row = task.diagonal ? smaller(task.rows, column + columns) : task.rows;
      blocks_.pack_columns(column, columns);
      for (int64_t row = 0; row < last_row; row += TILE) {
        Tile tile{row, smaller(TILE, last_row - row), column, columns, task.diagonal && row == column, false};
        tile.complete = none_dropped(tile);
        if (!tile.complete && all_dropped(tile)) continue;
        blocks_.multiply(tile, tile_memory);
        visit(tile);
      }
    }
  }

  void add_gradients(const Tile& tile, T* grad_query, T* grad_key) {
    blocks_.add_gradients(tile, tile_memory, grad_query, grad_key);
  }

 private:
  Blocks blocks_;
  Factor<T> one_factor_;  // if all rows have the same scale

  // Within a segment, dropped ranges begin and end at ascending columns from row to row.
  bool none_dropped(const Tile& tile) const {
    const int64_t first = task.row_begin + tile.row, begin = task.column_begin + tile.column;
    return !problem.query.code && !tile.triangle &&
           (problem.drop_begin[first] >= begin + tile.columns || problem.drop_end[first + tile.rows - 1] <= begin);
  }

  bool all_dropped(const Tile& tile) const {
    const int64_t row = task.row_begin + tile.row;
    const int64_t begin = task.column_begin + tile.column, end = begin + tile.columns;
    for (int64_t i = row; i < row + tile.rows; i++)
      if (problem.drop_begin[i] > begin || problem.drop_end[i] < end) return false;
    return true;
  }
};

}  // namespace mcl::MCL_INSTRUCTION_SET
