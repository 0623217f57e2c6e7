// One task: a block of sorted queries against a block of sorted keys, walked in tiles that stay in the cache.
//
//   forward   row and column sums of exp(s_ij - reference), merged into the running ones
//   backward  W_ij = where(keep_ij, gb_i exp(s_ij - b_i) + gc_j exp(s_ij - c_j), 0)
//             dq_i += scale_i sum_j W_ij k_j,  dk_j += sum_i scale_i W_ij q_i,  dscale_i += sum_j W_ij <q_i, k_j>
//   count     of the kept pairs above the query's threshold
//
// A block is packed once a task, its rows in sorted order; the keys of a tile also as columns, in panels. The order in which a task adds is fixed, so the result depends on the order of the tasks that share a block only.
#pragma once

#include "product.h"

namespace mcl::MCL_INSTRUCTION_SET {

// Columns of a tile: whole panels and whole groups for every type and instruction set.
constexpr int64_t TILE = 192;

// With |s_ij| at most this, no sum of exponentials leaves the range of fp32, and no maximum has to be found first.
constexpr double BOUNDED_LOGIT = 60;
// With all LSE of a task within this of each other, one exponential serves a pair's row and its column.
constexpr double NEAR_LSE = 40;

template <class T>
int64_t padded_width(int64_t width) {
  // One vector more than needed: rows a power of two apart would compete for few sets of the cache.
  return round_up(width, LANES<T>) + LANES<T>;
}

// The buffers of a task, in one allocation.
template <class T>
struct Workspace {
  int64_t stride;  // of packed rows
  T *query, *key;  // [rows, stride], [columns, stride]: packed rows, zeros behind D and behind the last row
  T* key_panels;   // [TILE / PANEL, stride, PANEL]: the keys of a tile as columns
  T* tile;         // [TILE, TILE_STRIDE]: logits, then weights
  T *grad_query, *grad_key;      // [rows, stride], [columns, stride]
  T *row_factor, *row_lse;       // [rows]
  T *column_factor, *column_lse;  // [columns]

  static constexpr int64_t TILE_STRIDE = TILE + LANES<T>;

  Workspace(char* memory, int64_t width, int64_t rows, int64_t columns) : stride(padded_width<T>(width)) {
    next_ = memory;
    const int64_t padded_rows = round_up(rows, TILE), padded_columns = round_up(columns, TILE);
    query = take(padded_rows * stride);
    key = take(padded_columns * stride);
    key_panels = take(TILE * stride);
    tile = take(TILE * TILE_STRIDE);
    grad_query = take(padded_rows * stride);
    grad_key = take(padded_columns * stride);
    row_factor = take(padded_rows);
    row_lse = take(padded_rows);
    column_factor = take(padded_columns);
    column_lse = take(padded_columns);
  }

  static int64_t bytes(int64_t width, int64_t rows, int64_t columns) {
    const Workspace all(nullptr, width, rows, columns);
    return all.next_ - static_cast<char*>(nullptr);
  }

 private:
  char* next_;
  T* take(int64_t count) {
    char* start = next_;
    next_ += round_up(count * sizeof(T), 64);
    return reinterpret_cast<T*>(start);
  }
};

// ---- packing ----

inline float from_bfloat16(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
}

inline float from_float16(uint16_t bits) {
  // Exponent and mantissa moved into place and multiplied by 2^112, which puts subnormals right; then infinity and NaN.
  const uint32_t magnitude = uint32_t(bits & 0x7fff) << 13, sign = uint32_t(bits & 0x8000) << 16;
  float scaled;
  __builtin_memcpy(&scaled, &magnitude, sizeof scaled);
  scaled *= 0x1p112f;
  uint32_t word;
  __builtin_memcpy(&word, &scaled, sizeof word);
  word = (magnitude >= 0x0f800000u ? word | 0x7f800000u : word) | sign;
  __builtin_memcpy(&scaled, &word, sizeof scaled);
  return scaled;
}

template <class T>
void copy_row(const Side& side, int64_t row, int64_t width, T* to) {
  const int64_t offset = row * side.row_stride;
  switch (side.dtype) {
    case Dtype::float32: {
      const float* from = static_cast<const float*>(side.data) + offset;
      for (int64_t d = 0; d < width; d++) to[d] = from[d];
      break;
    }
    case Dtype::float64: {
      const double* from = static_cast<const double*>(side.data) + offset;
      for (int64_t d = 0; d < width; d++) to[d] = from[d];
      break;
    }
    case Dtype::bfloat16: {
      const uint16_t* from = static_cast<const uint16_t*>(side.data) + offset;
      for (int64_t d = 0; d < width; d++) to[d] = from_bfloat16(from[d]);
      break;
    }
    case Dtype::float16: {
      const uint16_t* from = static_cast<const uint16_t*>(side.data) + offset;
      for (int64_t d = 0; d < width; d++) to[d] = from_float16(from[d]);
      break;
    }
  }
}

// Sorted rows lie anywhere in memory: fetched this many ahead of their use, they are there in time.
constexpr int64_t PREFETCH_ROWS = 4;

inline void prefetch_row(const Side& side, int64_t row, int64_t width) {
  const int64_t bytes = side.dtype == Dtype::float64 ? 8 : side.dtype == Dtype::float32 ? 4 : 2;
  const char* from = static_cast<const char*>(side.data) + row * side.row_stride * bytes;
  for (int64_t at = 0; at < width * bytes; at += 64) __builtin_prefetch(from + at);
}

// Rows begin .. begin + count - 1 of the sorted side. Returns the largest squared norm, NaN where there is a NaN.
template <class T>
T pack_rows(const Side& side, int64_t begin, int64_t count, int64_t width, int64_t stride, T* to) {
  T largest = 0;
  for (int64_t r = 0; r < count; r++) {
    T* row = to + r * stride;
    if (r + PREFETCH_ROWS < count) prefetch_row(side, side.order[begin + r + PREFETCH_ROWS], width);
    copy_row(side, side.order[begin + r], width, row);
    for (int64_t d = width; d < stride; d++) row[d] = 0;
    Vector<T> squares{};
    for (int64_t d = 0; d < stride; d += LANES<T>) squares += load<Vector<T>>(row + d) * load<Vector<T>>(row + d);
    const T norm = sum_lanes<T>(squares);
    largest = norm <= largest || largest != largest ? largest : norm;
  }
  // Whole groups of rows are multiplied, and whole vectors of them transposed.
  const int64_t padded = larger(round_up(count, GROUP), round_up(count, LANES<T>));
  __builtin_memset(to + count * stride, 0, (padded - count) * stride * sizeof(T));
  return largest;
}

// LANES x LANES values, the rows of `from` into columns of `to`.
template <class T>
inline void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  Vector<T> rows[LANES<T>], mixed[LANES<T>];
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES<T>; i++) rows[i] = load<Vector<T>>(from + i * from_stride);
  // Each step interleaves the first half of the rows with the second.
#pragma GCC unroll 4
  for (int64_t step = 1; step < LANES<T>; step *= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < LANES<T> / 2; i++) {
      mixed[2 * i] = interleave<T, 0>(rows[i], rows[i + LANES<T> / 2]);
      mixed[2 * i + 1] = interleave<T, 1>(rows[i], rows[i + LANES<T> / 2]);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES<T>; i++) rows[i] = mixed[i];
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES<T>; i++) store(to + i * to_stride, rows[i]);
}

// The rows as columns, in panels [width, PANEL]. Of the last panel only whole vectors of columns are written.
template <class T>
void pack_panels(const T* rows, int64_t count, int64_t width, int64_t stride, T* panels) {
  for (int64_t first = 0; first < count; first += PANEL<T>) {
    T* panel = panels + first * stride;
    for (int64_t d = 0; d < width; d += LANES<T>)
      for (int64_t j = 0; j < smaller(PANEL<T>, count - first); j += LANES<T>)
        transpose_square(rows + (first + j) * stride + d, stride, panel + d * PANEL<T> + j, PANEL<T>);
  }
}

// ---- which pairs of a row are kept ----

// Columns of one row of a tile, relative to the tile.
template <class T>
struct KeptColumns {
  int64_t start;               // where the row begins, a multiple of LANES
  int64_t columns;             // of the tile
  int64_t drop_begin, drop_end;
  const int32_t* codes;        // of the columns; null: the dropped range says all
  int32_t code;                // of the row

  Mask<T> keep(int64_t j) const {
    using Lane = decltype(+Mask<T>{}[0]);
    Mask<T> lane;
    for (int64_t l = 0; l < LANES<T>; l++) lane[l] = Lane(j + l);
    Mask<T> kept = ((lane < Lane(drop_begin)) | (lane >= Lane(drop_end))) & (lane < Lane(columns));
    if (codes)
      for (int64_t l = 0; l < LANES<T>; l++) kept[l] &= -(j + l < columns && codes[j + l] != code);
    return kept;
  }

  // body(j, kept) for each vector of columns that may hold a kept pair; kept is `Everything` where no lane is dropped.
  struct Everything {};
  template <class Body>
  void for_each_vector(Body body) const {
    const int64_t whole = columns / LANES<T> * LANES<T>;  // behind it the last lanes are no columns
    int64_t mixed_begin = larger(start, drop_begin / LANES<T> * LANES<T>);
    int64_t mixed_end = smaller(round_up(drop_end, LANES<T>), whole);
    if (drop_begin >= drop_end) mixed_begin = mixed_end = start;
    if (codes) mixed_begin = start, mixed_end = whole;
    const int64_t plain_ends[] = {smaller(mixed_begin, whole), whole};
    int64_t j = start;
    for (const int64_t end : plain_ends) {
      for (; j < end; j += LANES<T>) body(j, Everything{});
      for (const int64_t last = end < whole ? mixed_end : columns; j < last; j += LANES<T>) body(j, keep(j));
    }
  }
};

template <class T>
inline Vector<T> where(Mask<T> kept, Vector<T> value, T otherwise) {
  return kept ? value : broadcast(otherwise);
}
template <class T>
inline Vector<T> where(typename KeptColumns<T>::Everything, Vector<T> value, T) {
  return value;
}

// ---- the walk over the tiles of a task ----

struct Tile {
  int64_t row, rows;        // of the task
  int64_t column, columns;
};

template <class T>
class Walk {
 public:
  const Problem<T>& problem;
  const Task& task;
  Workspace<T> space;
  T largest_product;  // |<q_i, k_j>| is at most this; NaN where an input is

  Walk(const Problem<T>& problem, const Task& task, char* memory)
      : problem(problem), task(task), space(memory, problem.width, task.rows, task.columns) {
    const int64_t width = problem.width, stride = space.stride;
    const T query_norm = pack_rows(problem.query, task.row_begin, task.rows, width, stride, space.query);
    T key_norm = query_norm;
    if (task.diagonal)
      space.key = space.query;
    else
      key_norm = pack_rows(problem.key, task.column_begin, task.columns, width, stride, space.key);
    largest_product = __builtin_sqrt(query_norm) * __builtin_sqrt(key_norm);
  }

  int64_t query_row(int64_t i) const { return problem.query.order[task.row_begin + i]; }
  int64_t key_row(int64_t j) const { return problem.key.order[task.column_begin + j]; }
  T scale(int64_t i) const { return problem.scale[query_row(i) * problem.scale_stride]; }

  // Products of the tile's row i, later its logits or weights.
  T* tile_row(int64_t i) const { return space.tile + i * Workspace<T>::TILE_STRIDE; }

  KeptColumns<T> kept_columns(const Tile& tile, int64_t i) const {
    const int64_t begin = task.column_begin + tile.column, row = task.row_begin + tile.row + i;
    KeptColumns<T> kept{0, tile.columns, problem.drop_begin[row] - begin, problem.drop_end[row] - begin, nullptr, 0};
    // Beyond the tile they may not fit the lanes.
    kept.drop_begin = larger<int64_t>(0, smaller(kept.drop_begin, tile.columns));
    kept.drop_end = larger<int64_t>(0, smaller(kept.drop_end, tile.columns));
    if (task.diagonal) {
      // The row's own range holds the row itself; what is left of it was met as a column.
      kept.drop_begin = 0;
      kept.start = kept.drop_end / LANES<T> * LANES<T>;
    }
    if (problem.query.code) {
      kept.code = problem.query.code[row];
      kept.codes = problem.key.code + begin;
    }
    return kept;
  }

  // visit(tile) for each tile that may hold a kept pair, with its products computed.
  template <class Visit>
  void for_each_tile(Visit visit) const {
    for (int64_t column = 0; column < task.columns; column += TILE) {
      const int64_t columns = smaller(TILE, task.columns - column);
      pack_panels(space.key + column * space.stride, columns, problem.width, space.stride, space.key_panels);
      const int64_t last_row = task.diagonal ? smaller(task.rows, column + columns) : task.rows;
      for (int64_t row = 0; row < last_row; row += TILE) {
        const Tile tile{row, smaller(TILE, last_row - row), column, columns};
        if (all_dropped(tile)) continue;
        multiply(tile);
        visit(tile);
      }
    }
  }

 private:
  bool all_dropped(const Tile& tile) const {
    const int64_t row = task.row_begin + tile.row;
    const int64_t begin = task.column_begin + tile.column, end = begin + tile.columns;
    for (int64_t i = row; i < row + tile.rows; i++)
      if (problem.drop_begin[i] > begin || problem.drop_end[i] < end) return false;
    return true;
  }

  void multiply(const Tile& tile) const {
    const bool triangle = task.diagonal && tile.row == tile.column;
    for (int64_t j = 0; j < tile.columns; j += PANEL<T>) {
      const int64_t columns = round_up(smaller(PANEL<T>, tile.columns - j), LANES<T>);
      // On the diagonal: the rows above the panel, and then for each vector of its columns the rows beside it.
      multiply_panel(tile, 0, triangle ? j : tile.rows, j, columns);
      if (triangle)
        for (int64_t v = 0; v < columns; v += LANES<T>)
          multiply_panel(tile, j + v, smaller(LANES<T>, tile.rows - j - v), j + v, columns - v);
    }
  }

  // The products of `rows` rows of the tile with columns first .. first + columns - 1 of one panel.
  void multiply_panel(const Tile& tile, int64_t row, int64_t rows, int64_t first, int64_t columns) const {
    const T* panel = space.key_panels + first / PANEL<T> * PANEL<T> * space.stride + first % PANEL<T>;
    multiply_add<T, false>({rows, columns, problem.width, space.query + (tile.row + row) * space.stride, space.stride,
                            panel, PANEL<T>, 0, tile_row(row) + first, Workspace<T>::TILE_STRIDE, false});
  }
};

// ---- forward ----

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
template <class T, bool BOTH_SIDES>
void sum_bounded(const Walk<T>& walk, const Tile& tile) {
  using V = Vector<T>;
  const auto& p = walk.problem;
  alignas(64) T column_sums[TILE] = {};
  for (int64_t i = 0; i < tile.rows; i++) {
    const T* products = walk.tile_row(i);
    const Factor<T> scale(walk.scale(tile.row + i));
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
template <class T>
void sum_shifted(const Walk<T>& walk, const Tile& tile, bool both_sides) {
  using V = Vector<T>;
  const auto& p = walk.problem;
  const T lowest = -__builtin_inf();
  alignas(64) T column_shift[TILE], column_sums[TILE] = {};
  for (T& shift : column_shift) shift = lowest;

  for (int64_t i = 0; i < tile.rows; i++) {
    T* logits = walk.tile_row(i);
    const V scale = broadcast(walk.scale(tile.row + i));
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

template <class T>
T largest_scale(const Walk<T>& walk) {
  T largest = 0;
  for (int64_t i = 0; i < walk.task.rows; i++) {
    const T size = __builtin_fabs(walk.scale(i));
    largest = size <= largest || largest != largest ? largest : size;
    if (walk.problem.scale_stride == 0) break;
  }
  return largest;
}

template <class T>
void forward_task(const Problem<T>& problem, const Task& task, char* workspace) {
  const Walk<T> walk(problem, task, workspace);
  const bool both_sides = problem.column_total;
  const bool bounded = largest_scale(walk) * walk.largest_product <= BOUNDED_LOGIT;
  walk.for_each_tile([&](const Tile& tile) {
    if (!bounded)
      sum_shifted(walk, tile, both_sides);
    else if (both_sides)
      sum_bounded<T, true>(walk, tile);
    else
      sum_bounded<T, false>(walk, tile);
  });
}

// ---- backward ----

// LSE and gradient of the rows and the columns of a task.
template <class T>
struct Weights {
  // One exponential for row and column: W_ij = exp(s_ij) 2^-log2_middle (row_factor_i + column_factor_j).
  bool near;
  T log2_middle;  // a whole number
};

template <class T>
Weights<T> load_weights(const Walk<T>& walk) {
  const auto& p = walk.problem;
  const auto& space = walk.space;
  for (int64_t i = 0; i < walk.task.rows; i++) {
    space.row_lse[i] = p.row_lse[walk.query_row(i)];
    space.row_factor[i] = p.row_grad[walk.query_row(i)];
  }
  for (int64_t j = 0; j < walk.task.columns; j++) {
    space.column_lse[j] = p.column_lse ? p.column_lse[walk.key_row(j)] : T(0);
    space.column_factor[j] = p.column_lse ? p.column_grad[walk.key_row(j)] : T(0);
  }
  for (int64_t j = walk.task.columns; j < round_up(walk.task.columns, LANES<T>); j++)
    space.column_lse[j] = space.column_factor[j] = 0;

  T lowest = __builtin_inf(), highest = -__builtin_inf();
  bool ordered = true;
  const auto include = [&](const T* lse, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
      if (lse[i] == -T(__builtin_inf())) continue;  // keeps nothing
      ordered &= lse[i] - lse[i] == 0;
      lowest = smaller(lowest, lse[i]);
      highest = larger(highest, lse[i]);
    }
  };
  include(space.row_lse, walk.task.rows);
  if (p.column_lse) include(space.column_lse, walk.task.columns);
  const Weights<T> weights{ordered && highest - lowest <= NEAR_LSE, __builtin_rint((lowest + highest) / 2 * LOG2_E)};
  if (weights.near) {
    const auto fold = [&](const T* lse, T* factor, int64_t count) {
      for (int64_t i = 0; i < count; i++)
        factor[i] = lse[i] == -T(__builtin_inf()) ? T(0) : T(factor[i] * __builtin_exp2(weights.log2_middle - lse[i] * LOG2_E));
    };
    fold(space.row_lse, space.row_factor, walk.task.rows);
    if (p.column_lse) fold(space.column_lse, space.column_factor, walk.task.columns);
  }
  return weights;
}

// Products become scale_i W_ij, with zeros where nothing is kept.
template <class T, bool NEAR, bool SCALE>
void weigh(const Walk<T>& walk, const Tile& tile, const Weights<T>& weights) {
  using V = Vector<T>;
  const auto& p = walk.problem;
  const T* column_factor = walk.space.column_factor + tile.column;
  const T* column_lse = walk.space.column_lse + tile.column;
  for (int64_t i = 0; i < tile.rows; i++) {
    T* row = walk.tile_row(i);
    const Factor<T> scale(walk.scale(tile.row + i));
    const V factor = broadcast(walk.space.row_factor[tile.row + i]);
    const V lse = broadcast(walk.space.row_lse[tile.row + i]);
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
        if (p.column_lse) w += load<V>(column_factor + j) * exp_anywhere(logits - load<V>(column_lse + j));
      }
      w = where<T>(kept, w, 0);
      if (SCALE) grad_scale += where<T>(kept, w * products, 0);
      store(row + j, w * scale.natural);
    });
    if (SCALE) p.grad_scale[walk.task.row_begin + tile.row + i] += sum_lanes<T>(grad_scale);
  }
}

// The gradient of a block as earlier tasks left it.
template <class T>
void read_gradient(const T* grad, const Side& side, int64_t begin, int64_t count, bool first, int64_t width,
                   int64_t stride, T* to) {
  if (first) __builtin_memset(to, 0, count * stride * sizeof(T));
  for (int64_t r = 0; r < count && !first; r++) {
    __builtin_memcpy(to + r * stride, grad + side.order[begin + r] * width, width * sizeof(T));
    for (int64_t d = width; d < stride; d++) to[r * stride + d] = 0;
  }
}

template <class T>
void write_gradient(const T* from, const Side& side, int64_t begin, int64_t count, int64_t width, int64_t stride, T* grad) {
  for (int64_t r = 0; r < count; r++)
    __builtin_memcpy(grad + side.order[begin + r] * width, from + r * stride, width * sizeof(T));
}

template <class T>
void backward_task(const Problem<T>& problem, const Task& task, char* workspace) {
  Walk<T> walk(problem, task, workspace);
  Workspace<T>& space = walk.space;
  const Weights<T> weights = load_weights(walk);
  const int64_t width = problem.width, stride = space.stride, features = round_up(width, LANES<T>);
  T* grad_key = problem.self ? problem.grad_query : problem.grad_key;
  if (task.diagonal) space.grad_key = space.grad_query;
  if (problem.grad_query)
    read_gradient(problem.grad_query, problem.query, task.row_begin, task.rows, task.first_of_rows, width, stride,
                  space.grad_query);
  if (grad_key && !task.diagonal)
    read_gradient(grad_key, problem.key, task.column_begin, task.columns, task.first_of_columns, width, stride,
                  space.grad_key);

  walk.for_each_tile([&](const Tile& tile) {
    if (!weights.near)
      problem.grad_scale ? weigh<T, false, true>(walk, tile, weights) : weigh<T, false, false>(walk, tile, weights);
    else
      problem.grad_scale ? weigh<T, true, true>(walk, tile, weights) : weigh<T, true, false>(walk, tile, weights);
    // On the diagonal the weights are a triangle: column > row.
    const bool triangle = task.diagonal && tile.row == tile.column;
    const Band rows = triangle ? Band{0, INT64_MAX / 2} : Band{}, columns = triangle ? Band{INT64_MIN / 2, 0} : Band{};
    if (problem.grad_query)
      multiply_add<T, false>({tile.rows, features, tile.columns, space.tile, Workspace<T>::TILE_STRIDE,
                              space.key + tile.column * stride, stride, PANEL<T>,
                              space.grad_query + tile.row * stride, stride, true},
                             rows);
    if (grad_key)
      multiply_add<T, true>({tile.columns, features, tile.rows, space.tile, Workspace<T>::TILE_STRIDE,
                             space.query + tile.row * stride, stride, PANEL<T>,
                             space.grad_key + tile.column * stride, stride, true},
                            columns);
  });

  if (problem.grad_query)
    write_gradient(space.grad_query, problem.query, task.row_begin, task.rows, width, stride, problem.grad_query);
  if (grad_key && !task.diagonal)
    write_gradient(space.grad_key, problem.key, task.column_begin, task.columns, width, stride, grad_key);
}

// ---- counting ----

template <class T>
void count_task(const Problem<T>& problem, const Task& task, char* workspace) {
  const Walk<T> walk(problem, task, workspace);
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

template <class T>
int64_t workspace_bytes(int64_t width, int64_t rows, int64_t columns) {
  return Workspace<T>::bytes(width, rows, columns);
}

template <class T>
Kernels<T> kernels() {
  return {forward_task<T>, backward_task<T>, count_task<T>, workspace_bytes<T>};
}

}  // namespace mcl::MCL_INSTRUCTION_SET
