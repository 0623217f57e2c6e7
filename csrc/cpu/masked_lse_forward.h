// Forward: row and column sums of exp(s_ij - reference) of each tile, merged into the running sums.
#pragma once

#include "task_walk.h"

namespace mcl::MCL_INSTRUCTION_SET {

// If s_ij exceeds its reference by at most this, no sum of exponentials overflows fp32.
constexpr double BOUNDED_LOGIT = 60;
// To a sum below this, the terms that exp flushes to zero (below 1e-38) could matter.
constexpr double SMALLEST_SUM = 1e-26;

template <class T>
inline void merge(T& shift, T& total, T new_shift, T new_total) {
  if (new_total == 0) return;  // no pair is kept, and the reference is arbitrary
  if (shift == new_shift) {
    total += new_total;
  } else {
    const T both = larger(shift, new_shift);
    total = total * __builtin_exp(shift - both) + new_total * __builtin_exp(new_shift - both);
    shift = both;
  }
}

// Replaces an infinite maximum by 0: inf - inf would be NaN, and inf has to stay inf.
template <class T>
inline T finite_or_zero(T maximum) {
  return maximum - maximum == 0 ? maximum : T(0);
}

// Uses one reference for all pairs, log2_reference (an integer) times ln 2, so that no maximum has to be found first.
// Returns false, with nothing merged, if the reference is too far above the logits of some row or column.
template <bool BOTH_SIDES, bool ZERO, class Walk>
bool sum_bounded(const Walk& walk, const Tile& tile, typename Walk::T log2_reference) {
  using T = typename Walk::T;
  using V = Vector<T>;
  const auto& p = walk.problem;
  alignas(64) T row_sums[TILE], column_sums[TILE] = {};
  for (int64_t i = 0; i < tile.rows; i++) {
    const T* products = walk.tile_row(i);
    const Factor<T> scale = walk.factor(tile.row + i);
    V row_sum{};
    walk.kept_columns(tile, i).for_each_vector([&](int64_t j, auto kept) {
      const V x = load<V>(products + j);
      const V e = where<T>(kept, ZERO ? exp_of_product(x, scale) : exp_of_product(x, scale, log2_reference), 0);
      row_sum += e;
      if (BOTH_SIDES) store(column_sums + j, load<V>(column_sums + j) + e);
    });
    row_sums[i] = sum_lanes<T>(row_sum);
  }

  if (!ZERO) {
    T smallest = row_sums[0];
    for (int64_t i = 0; i < tile.rows; i++) smallest = smaller(smallest, row_sums[i]);
    for (int64_t j = 0; j < tile.columns && BOTH_SIDES; j++) smallest = smaller(smallest, column_sums[j]);
    if (smallest < SMALLEST_SUM) return false;
  }
  // The sums are multiples of 2^log2_reference. An integer shift, exact in T, replaces its logarithm; `factor` corrects
  // for the difference.
  const T shift = __builtin_rint(log2_reference / LOG2_E), factor = __builtin_exp(log2_reference / LOG2_E - shift);
  for (int64_t i = 0; i < tile.rows; i++) {
    const int64_t row = walk.task.row_begin + tile.row + i;
    merge(p.row_shift[row], p.row_total[row], shift, row_sums[i] * factor);
  }
  for (int64_t j = 0; j < tile.columns && BOTH_SIDES; j++) {
    const int64_t column = walk.task.column_begin + tile.column + j;
    merge(p.column_shift[column], p.column_total[column], shift, column_sums[j] * factor);
  }
  return true;
}

// For any logits: sums of exp(s_ij - maximum), once with the maximum of the row and once with that of the column.
template <class Walk>
void sum_shifted(const Walk& walk, const Tile& tile, bool both_sides) {
  using T = typename Walk::T;
  using V = Vector<T>;
  const auto& p = walk.problem;
  const T lowest = -__builtin_inf();
  alignas(64) T column_shift[TILE], column_sums[TILE] = {};
  for (T& shift : column_shift) shift = lowest;

  for (int64_t i = 0; i < tile.rows; i++) {
    T* logits = walk.tile_row(i);
    const V scale = walk.factor(tile.row + i).natural;
    V maximum = broadcast(lowest);
    const auto kept_columns = walk.kept_columns(tile, i);
    kept_columns.for_each_vector([&](int64_t j, auto kept) {
      const V s = where<T>(kept, scale * load<V>(logits + j), lowest);
      const V column = load<V>(column_shift + j);
      maximum = s > maximum ? s : maximum;
      store(column_shift + j, s > column ? s : column);
      store(logits + j, s);
    });
    const T shift = finite_or_zero(largest_lane<T>(maximum));
    V row_sum{};
    kept_columns.for_each_vector([&](int64_t j, auto) { row_sum += exp_anywhere(load<V>(logits + j) - shift); });
    const int64_t row = walk.task.row_begin + tile.row + i;
    merge(p.row_shift[row], p.row_total[row], shift, sum_lanes<T>(row_sum));
  }

  if (!both_sides) return;
  for (T& shift : column_shift) shift = finite_or_zero(shift);
  for (int64_t i = 0; i < tile.rows; i++) {
    const T* logits = walk.tile_row(i);
    walk.kept_columns(tile, i).for_each_vector([&](int64_t j, auto) {
      const V e = exp_anywhere(load<V>(logits + j) - load<V>(column_shift + j));
      store(column_sums + j, load<V>(column_sums + j) + e);
    });
  }
  for (int64_t j = 0; j < tile.columns; j++) {
    const int64_t column = walk.task.column_begin + tile.column + j;
    merge(p.column_shift[column], p.column_total[column], column_shift[j], column_sums[j]);
  }
}

template <class Walk>
auto largest_scale(const Walk& walk) {
  using T = typename Walk::T;
  T largest = 0;
  for (int64_t i = 0; i < walk.task.rows; i++) {
    const T size = __builtin_fabs(walk.scale(i));
    largest = size <= largest || largest != largest ? largest : size;
    if (walk.problem.scale_stride == 0) break;
  }
  return largest;
}

template <class Blocks>
void forward_task(const Problem<typename Blocks::Value>& problem, const Task& task, char* workspace) {
  using T = typename Blocks::Value;
  Arena arena(workspace);
  Walk<Blocks> walk(problem, task, arena);
  const bool both_sides = problem.column_total;
  // The reference is 0 unless logits are large, as in CLIP, whose scale is up to 100.
  const T bound = largest_scale(walk) * walk.largest_product;
  const bool bounded = bound <= 4 * BOUNDED_LOGIT;
  const T log2_reference = bound <= BOUNDED_LOGIT ? T(0) : T(__builtin_ceil((bound - BOUNDED_LOGIT) * LOG2_E));
  walk.for_each_tile([&](const Tile& tile) {
    bool done = false;
    if (bounded && log2_reference == 0)
      done = both_sides ? sum_bounded<true, true>(walk, tile, 0) : sum_bounded<false, true>(walk, tile, 0);
    else if (bounded)
      done = both_sides ? sum_bounded<true, false>(walk, tile, log2_reference)
                        : sum_bounded<false, false>(walk, tile, log2_reference);
    if (!done) sum_shifted(walk, tile, both_sides);
  });
}

}  // namespace mcl::MCL_INSTRUCTION_SET
