// Backward, from the LSE b of the rows and c of the columns and their gradients gb and gc:
//
//   W_ij = where(keep_ij, gb_i exp(s_ij - b_i) + gc_j exp(s_ij - c_j), 0)
//   dq_i += scale_i sum_j W_ij k_j,  dk_j += sum_i scale_i W_ij q_i,  dscale_i += sum_j W_ij <q_i, k_j>
#pragma once

#include "task_walk.h"

namespace mcl::MCL_INSTRUCTION_SET {

// With all LSE of a task within this of each other, one exponential serves a pair's row and its column.
constexpr double NEAR_LSE = 40;

// LSE of one side of a task, and the factors of its exponentials.
template <class T>
struct Weights {
  T *lse, *factor;  // [count], padded to full vectors

  // `lse` and `grad` hold the entire side in original order; null: the side has no LSE.
  Weights(Arena& arena, const T* lse, const T* grad, const int64_t* order, int64_t count)
      : lse(arena.take<T>(count + LANES<T>)), factor(arena.take<T>(count + LANES<T>)), count_(lse ? count : 0) {
    for (int64_t i = 0; i < count + LANES<T>; i++) {
      this->lse[i] = i < count_ ? lse[order[i]] : T(0);
      factor[i] = i < count_ ? grad[order[i]] : T(0);
    }
  }

  void include_in(T& lowest, T& highest, bool& finite) const {
    for (int64_t i = 0; i < count_; i++) {
      if (keeps_nothing(i)) continue;
      finite &= lse[i] - lse[i] == 0;
      lowest = smaller(lowest, lse[i]);
      highest = larger(highest, lse[i]);
    }
  }

  void multiply_by_exp(T log2_middle) {
    for (int64_t i = 0; i < count_; i++)
      factor[i] = keeps_nothing(i) ? T(0) : T(factor[i] * __builtin_exp2(log2_middle - lse[i] * LOG2_E));
  }

 private:
  int64_t count_;
  bool keeps_nothing(int64_t i) const { return lse[i] == -T(__builtin_inf()); }
};

template <class T>
struct PairWeights {
  Weights<T> rows, columns;
  bool two_sided;
  bool near;      // W_ij = exp(s_ij) 2^-log2_middle (rows.factor_i + columns.factor_j)
  T log2_middle;  // an integer

  PairWeights(Arena& arena, const Problem<T>& p, const Task& task)
      : rows(arena, p.row_lse, p.row_grad, p.query.order + task.row_begin, task.rows),
        columns(arena, p.column_lse, p.column_grad, p.key.order + task.column_begin, task.columns),
        two_sided(p.column_lse) {
    T lowest = __builtin_inf(), highest = -__builtin_inf();
    bool finite = true;
    rows.include_in(lowest, highest, finite);
    columns.include_in(lowest, highest, finite);
    near = finite && highest - lowest <= NEAR_LSE;
    log2_middle = __builtin_rint((lowest + highest) / 2 * LOG2_E);
    if (!near) return;
    rows.multiply_by_exp(log2_middle);
    columns.multiply_by_exp(log2_middle);
  }
};

// Turns products into scale_i W_ij, with zeros for dropped pairs.
template <bool NEAR, bool SCALE, class Walk, class T>
void weigh(const Walk& walk, const Tile& tile, const PairWeights<T>& weights) {
  using V = Vector<T>;
  const T *column_factor = weights.columns.factor + tile.column, *column_lse = weights.columns.lse + tile.column;
  for (int64_t i = 0; i < tile.rows; i++) {
    T* row = walk.tile_row(i);
    const Factor<T> scale = walk.factor(tile.row + i);
    const V factor = broadcast(weights.rows.factor[tile.row + i]), lse = broadcast(weights.rows.lse[tile.row + i]);
    V grad_scale{};
    const auto kept_columns = walk.kept_columns(tile, i);
    for (int64_t j = 0; j < kept_columns.start; j += LANES<T>) store(row + j, V{});
    kept_columns.for_each_vector([&](int64_t j, auto kept) {
      const V products = load<V>(row + j);
      V w;
      if (NEAR) {
        w = exp_of_product(products, scale, weights.log2_middle) * (factor + load<V>(column_factor + j));
      } else {
        const V logits = scale.natural * products;
        w = factor * exp_anywhere(logits - lse);
        if (weights.two_sided) w += load<V>(column_factor + j) * exp_anywhere(logits - load<V>(column_lse + j));
      }
      w = where<T>(kept, w, 0);
      if (SCALE) grad_scale += where<T>(kept, w * products, 0);
      store(row + j, w * scale.natural);
    });
    if (SCALE) walk.problem.grad_scale[walk.task.row_begin + tile.row + i] += sum_lanes<T>(grad_scale);
  }
}

// The gradient of a block: reads the sums of earlier tasks, and writes them back with this task's part added.
template <class T>
class BlockGradient {
 public:
  T* sums = nullptr;  // [count, stride]; null if not requested

  BlockGradient(Arena& arena, T* grad, const int64_t* order, int64_t count, bool first, int64_t width)
      : grad_(grad), order_(order), count_(count), width_(width), stride_(padded_width<T>(width)) {
    if (!grad) return;
    sums = arena.take<T>(round_up(count, TILE) * stride_);
    if (first) __builtin_memset(sums, 0, count * stride_ * sizeof(T));
    for (int64_t r = 0; r < count && !first; r++) {
      __builtin_memcpy(sums + r * stride_, grad + order[r] * width, width * sizeof(T));
      for (int64_t d = width; d < stride_; d++) sums[r * stride_ + d] = 0;
    }
  }

  void write() const {
    for (int64_t r = 0; r < count_ && grad_; r++)
      __builtin_memcpy(grad_ + order_[r] * width_, sums + r * stride_, width_ * sizeof(T));
  }

 private:
  T* grad_;  // of the entire side, in original order
  const int64_t* order_;
  int64_t count_, width_, stride_;
};

template <class Blocks>
void backward_task(const Problem<typename Blocks::Value>& p, const Task& task, char* workspace) {
  using T = typename Blocks::Value;
  Arena arena(workspace);
  Walk<Blocks> walk(p, task, arena);
  const PairWeights<T> weights(arena, p, task);
  // In the self form columns are rows; on its diagonal both are the same block.
  T* grad_key = p.self ? p.grad_query : p.grad_key;
  const BlockGradient<T> rows(arena, p.grad_query, p.query.order + task.row_begin, task.rows,
                              task.previous_of_rows == NO_TASK, p.width);
  const BlockGradient<T> columns(arena, task.diagonal ? nullptr : grad_key, p.key.order + task.column_begin,
                                 task.columns, task.previous_of_columns == NO_TASK, p.width);
  T* grad_columns = task.diagonal ? rows.sums : columns.sums;

  walk.for_each_tile([&](const Tile& tile) {
    if (weights.near)
      p.grad_scale ? weigh<true, true>(walk, tile, weights) : weigh<true, false>(walk, tile, weights);
    else
      p.grad_scale ? weigh<false, true>(walk, tile, weights) : weigh<false, false>(walk, tile, weights);
    walk.add_gradients(tile, rows.sums, grad_columns);
  });
  rows.write();
  columns.write();
}

// Workspace of a task of any kind. A backward task needs the most.
template <class Blocks>
int64_t workspace_bytes(int64_t width, int64_t rows, int64_t columns) {
  using T = typename Blocks::Value;
  Arena arena(nullptr);
  arena.take<T>(TILE * TILE_STRIDE<T>);
  Blocks(arena, width, rows, columns);
  const int64_t sides[] = {rows, columns};
  for (const int64_t side : sides) {
    arena.take<T>(round_up(side, TILE) * padded_width<T>(width));
    arena.take<T>(side + LANES<T>);
    arena.take<T>(side + LANES<T>);
  }
  return arena.bytes();
}

}  // namespace mcl::MCL_INSTRUCTION_SET
