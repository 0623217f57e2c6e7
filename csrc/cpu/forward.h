// Forward: row and column sums of exp(s_ij - reference) of each tile, merged into the running ones.
#pragma once

#include "walk.h"

namespace mcl::MCL_INSTRUCTION_SET {

// With |s_ij| at most this, no sum of exponentials leaves the range of fp32, and no maximum has to be found first.
constexpr double BOUNDED_LOGIT = 60;

template <class T>
inline void merge(T& shift, T& total, T new_shift, T new_total) {
  if (new_total == 0) return;  // nothing kept; its reference says nothing
  if (shift == new_shift) {
    total += new_total;
  } else {
    const T both = larger(shift, new_shift);
    total = total * __builtin_exp(shift - both) + new_total * __builtin_exp(new_shift - both);
    shift = both;
  }
}

// An infinite maximum is not subtracted: inf has to stay inf.
template <class T>
inline T finite_or_zero(T maximum) {
  return maximum - maximum == 0 ? maximum : T(0);
}

// |s_ij| <= BOUNDED_LOGIT: exp(s_ij) itself.
template <bool BOTH_SIDES, class Walk>
void sum_bounded(const Walk& walk, const Tile& tile) {
  using T = typename Walk::T;
  using V = Vector<T>;
  const auto& p = walk.problem;
  alignas(64) T column_sums[TILE] = {};
  for (int64_t i = 0; i < tile.rows; i++) {
    const T* products = walk.tile_row(i);
    const Factor<T> scale = walk.factor(tile.row + i);
    V row_sum{};
    walk.kept_columns(tile, i).for_each_vector([&](int64_t j, auto kept) {
      const V e = where<T>(kept, exp_of_product(load<V>(products + j), scale), 0);
      row_sum += e;
      if (BOTH_SIDES) store(column_sums + j, load<V>(column_sums + j) + e);
    });
    merge(p.row_shift[walk.task.row_begin + tile.row + i], p.row_total[walk.task.row_begin + tile.row + i], T(0), sum_lanes<T>(row_sum));
  }
  if (BOTH_SIDES)
    for (int64_t j = 0; j < tile.columns; j++) {
      const int64_t column = walk.task.column_begin + tile.column + j;
      merge(p.column_shift[column], p.column_total[column], T(0), column_sums[j]);
    }
}

// Any logits: exp(s_ij - maximum), with the maximum of the row and with that of the column.
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
    merge(p.row_shift[walk.task.row_begin + tile.row + i], p.row_total[walk.task.row_begin + tile.row + i], shift, sum_lanes<T>(row_sum));
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
  Arena arena(workspace);
  Walk<Blocks> walk(problem, task, arena);
  const bool both_sides = problem.column_total;
  const bool bounded = largest_scale(walk) * walk.largest_product <= BOUNDED_LOGIT;
  walk.for_each_tile([&](const Tile& tile) {
    if (!bounded)
      sum_shifted(walk, tile, both_sides);
    else if (both_sides)
      sum_bounded<true>(walk, tile);
    else
      sum_bounded<false>(walk, tile);
  });
}

}  // namespace mcl::MCL_INSTRUCTION_SET
