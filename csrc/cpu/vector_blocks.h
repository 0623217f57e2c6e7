// Blocks of queries and keys of a task, multiplied by the vector unit.
#pragma once

#include "arena.h"
#include "packing.h"

namespace mcl::MCL_INSTRUCTION_SET {

template <class T>
class VectorBlocks {
 public:
  using Value = T;

  VectorBlocks(Arena& arena, int64_t width, int64_t rows, int64_t columns)
      : width_(width),
        stride_(padded_width<T>(width)),
        query_(arena.take<T>(round_up(rows, TILE) * stride_)),
        key_(arena.take<T>(round_up(columns, TILE) * stride_)),
        key_panels_(arena.take<T>(TILE * stride_)) {}

  // Packs the rows of a task. Returns an upper bound of |<q_i, k_j>|, NaN if an input is NaN.
  T pack(const Problem<T>& problem, const Task& task) {
    const T query_norm = pack_rows(problem.query, task.row_begin, task.rows, width_, stride_, query_);
    if (task.diagonal) {
      key_ = query_;
      return query_norm;
    }
    const T key_norm = pack_rows(problem.key, task.column_begin, task.columns, width_, stride_, key_);
    return __builtin_sqrt(query_norm) * __builtin_sqrt(key_norm);
  }

  // Packs the columns of the next tiles.
  void pack_columns(int64_t column, int64_t columns) {
    pack_panels(key_ + column * stride_, columns, width_, stride_, key_panels_);
  }

  // products_ij = <q_i, k_j>
  void multiply(const Tile& tile, T* products) const {
    // In a triangle: first the rows above the panel, then for each vector of its columns the rows level with it. Rows
    // are taken in full groups within the tile, so that no product is computed twice.
    const auto groups_to = [&](int64_t row) { return round_up(smaller(row, tile.rows), GROUP); };
    for (int64_t j = 0; j < tile.columns; j += PANEL<T>) {
      const int64_t columns = round_up(smaller(PANEL<T>, tile.columns - j), LANES<T>);
      multiply_panel(tile, 0, groups_to(tile.triangle ? j : tile.rows), j, columns, products);
      if (tile.triangle)
        for (int64_t v = 0; v < columns; v += LANES<T>)
          multiply_panel(tile, groups_to(j + v), groups_to(j + v + LANES<T>), j + v, columns - v, products);
    }
  }

  // grad_query_i += sum_j weights_ij k_j and grad_key_j += sum_i weights_ij q_i; a null gradient is skipped.
  void add_gradients(const Tile& tile, T* weights, T* grad_query, T* grad_key) const {
    const int64_t features = round_up(width_, LANES<T>);
    const T *query = query_ + tile.row * stride_, *key = key_ + tile.column * stride_;
    const Band rows = tile.triangle ? Band{0, INT64_MAX / 2} : Band{};
    const Band columns = tile.triangle ? Band{INT64_MIN / 2, 0} : Band{};
    if (grad_query)
      multiply_add<T, false>({tile.rows, features, tile.columns, weights, TILE_STRIDE<T>, key, stride_, PANEL<T>,
                              grad_query + tile.row * stride_, stride_, true},
                             rows);
    if (grad_key)
      multiply_add<T, true>({tile.columns, features, tile.rows, weights, TILE_STRIDE<T>, query, stride_, PANEL<T>,
                             grad_key + tile.column * stride_, stride_, true},
                            columns);
  }

 private:
  int64_t width_, stride_;
  T *query_, *key_;  // [rows, stride], [columns, stride]: zeros after D and after the last row
  T* key_panels_;    // [TILE / PANEL, stride, PANEL]: the keys of the current tiles as columns

  // The products of rows row .. end - 1 of the tile with columns first .. first + columns - 1 of one panel.
  void multiply_panel(const Tile& tile, int64_t row, int64_t end, int64_t first, int64_t columns, T* products) const {
    const T* panel = key_panels_ + first / PANEL<T> * PANEL<T> * stride_ + first % PANEL<T>;
    const T* query = query_ + (tile.row + row) * stride_;
    multiply_add<T, false>({end - row, columns, width_, query, stride_, panel, PANEL<T>, 0,
                            products + row * TILE_STRIDE<T> + first, TILE_STRIDE<T>, false});
  }
};

}  // namespace mcl::MCL_INSTRUCTION_SET
