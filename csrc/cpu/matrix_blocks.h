// Blocks of bfloat16 queries and keys of a task, multiplied by the matrix unit (AMX).
//
// Products of bfloat16 are exact in fp32, so logits are as accurate as those of the vector unit. Weights are rounded to
// bfloat16 before they are multiplied by rows; their sums, and the gradient of the scale, stay fp32.
//
// A matrix register holds 16 rows of 64 bytes. The second factor of a product is stored in pairs: two consecutive
// elements of the summed dimension next to each other, for 16 columns.
#pragma once

#include <immintrin.h>

#include "arena.h"
#include "packing.h"

namespace mcl::MCL_INSTRUCTION_SET {

constexpr int64_t STEP = 32;  // rows, columns and depth of one round of the matrix unit

// Configures eight registers of 16 rows of 64 bytes. The configuration belongs to the thread.
class MatrixUnit {
 public:
  MatrixUnit() {
    alignas(64) uint8_t configuration[64] = {1};  // palette
    for (int i = 0; i < 8; i++) {
      configuration[16 + 2 * i] = 64;  // bytes a row
      configuration[48 + i] = 16;      // rows
    }
    _tile_loadconfig(configuration);
  }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
};

// C += A B, or C = A B: rows and columns in steps of 32, columns also of 16. A is bfloat16 [rows, depth], B is pairs
// [depth / 2, columns].
struct MatrixOperands {
  int64_t rows, columns, depth;
  const uint16_t* a;
  int64_t a_stride;
  const uint32_t* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
  bool accumulate;
};

template <bool TWO_COLUMNS>
inline void matrix_step(const MatrixOperands& o, int64_t i, int64_t j) {
  float* c = o.c + i * o.c_stride + j;
  const int64_t c_bytes = o.c_stride * 4;
  if (o.accumulate) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(2, c + 16 * o.c_stride, c_bytes);
    if (TWO_COLUMNS) _tile_loadd(1, c + 16, c_bytes);
    if (TWO_COLUMNS) _tile_loadd(3, c + 16 * o.c_stride + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < o.depth; k += STEP) {
    const uint16_t* a = o.a + i * o.a_stride + k;
    const uint32_t* b = o.b + k / 2 * o.b_stride + j;
    _tile_loadd(4, a, o.a_stride * 2);
    _tile_loadd(5, a + 16 * o.a_stride, o.a_stride * 2);
    _tile_loadd(6, b, o.b_stride * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (TWO_COLUMNS) {
      _tile_loadd(7, b + 16, o.b_stride * 4);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(2, c + 16 * o.c_stride, c_bytes);
  if (TWO_COLUMNS) _tile_stored(1, c + 16, c_bytes);
  if (TWO_COLUMNS) _tile_stored(3, c + 16 * o.c_stride + 16, c_bytes);
}

inline void matrix_multiply(const MatrixOperands& o) {
  for (int64_t j = 0; j < o.columns; j += STEP)
    for (int64_t i = 0; i < o.rows; i += STEP)
      o.columns - j > 16 ? matrix_step<true>(o, i, j) : matrix_step<false>(o, i, j);
}

class MatrixBlocks {
 public:
  using Value = float;

  MatrixBlocks(Arena& arena, int64_t width, int64_t rows, int64_t columns)
      : width_(width),
        depth_(round_up(width, STEP)),
        stride_(depth_ + STEP),
        grad_stride_(padded_width<float>(width)),
        query_(arena.take<uint16_t>(round_up(rows, TILE) * stride_)),
        key_(arena.take<uint16_t>(round_up(columns, TILE) * stride_)),
        query_pairs_(arena.take<uint32_t>(TILE / 2 * stride_)),
        key_pairs_(arena.take<uint32_t>(TILE / 2 * stride_)),
        key_columns_(arena.take<uint32_t>(TILE * depth_ / 2)),
        weights_(arena.take<uint16_t>(TILE * WEIGHT_STRIDE)),
        weights_transposed_(arena.take<uint16_t>(TILE * WEIGHT_STRIDE)) {}

  float pack(const Problem<float>& problem, const Task& task) {
    const float query_norm = pack_side(problem.query, task.row_begin, task.rows, query_);
    if (task.diagonal) {
      key_ = query_;
      return query_norm;
    }
    const float key_norm = pack_side(problem.key, task.column_begin, task.columns, key_);
    return __builtin_sqrtf(query_norm) * __builtin_sqrtf(key_norm);
  }

  void pack_columns(int64_t column, int64_t columns) {
    // Two adjacent features of a key are one pair, and a pair is transposed as if it were one float.
    const float* rows = reinterpret_cast<const float*>(key_ + column * stride_);
    for (int64_t j = 0; j < columns; j += 16)
      for (int64_t d = 0; d < depth_ / 2; d += 16)
        transpose_square(rows + j * (stride_ / 2) + d, stride_ / 2,
                         reinterpret_cast<float*>(key_columns_) + d * TILE + j, TILE);
    pack_pairs(key_ + column * stride_, columns, key_pairs_);
  }

  void multiply(const Tile& tile, float* products) const {
    matrix_multiply({tile.rows, round_up(tile.columns, 16), depth_, query_ + tile.row * stride_, stride_, key_columns_,
                     TILE, products, TILE_STRIDE<float>, false});
  }

  void add_gradients(const Tile& tile, float* weights, float* grad_query, float* grad_key) {
    round_weights(tile, weights);
    const int64_t features = round_up(width_, 16);
    if (grad_query)
      matrix_multiply({tile.rows, features, tile.columns, weights_, WEIGHT_STRIDE, key_pairs_, stride_,
                       grad_query + tile.row * grad_stride_, grad_stride_, true});
    if (grad_key) {
      pack_pairs(query_ + tile.row * stride_, tile.rows, query_pairs_);
      matrix_multiply({tile.columns, features, tile.rows, weights_transposed_, WEIGHT_STRIDE, query_pairs_, stride_,
                       grad_key + tile.column * grad_stride_, grad_stride_, true});
    }
  }

 private:
  static constexpr int64_t WEIGHT_STRIDE = TILE + STEP;
  int64_t width_, depth_, stride_, grad_stride_;
  MatrixUnit unit_;
  uint16_t *query_, *key_;                // [rows, stride], [columns, stride]: zeros after D and after the last row
  uint32_t *query_pairs_, *key_pairs_;    // [TILE / 2, stride]: pairs of rows of the tile
  uint32_t* key_columns_;                 // [depth / 2, TILE]: pairs of features of its columns
  uint16_t *weights_, *weights_transposed_;  // [rows, columns] and [columns, rows] of the tile

  // Packs rows like pack_rows, but leaves them in bfloat16.
  float pack_side(const Side& side, int64_t begin, int64_t count, uint16_t* to) const {
    float largest = 0;
    for (int64_t r = 0; r < count; r++) {
      uint16_t* row = to + r * stride_;
      if (r + PREFETCH_ROWS < count) prefetch_row(side.rows, side.order[begin + r + PREFETCH_ROWS], width_);
      __builtin_memcpy(row, address_of(side.rows, side.order[begin + r]), width_ * 2);
      __builtin_memset(row + width_, 0, (stride_ - width_) * 2);
      Vector<float> squares{};
      for (int64_t d = 0; d < depth_; d += 16) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + d)));
        const Vector<float> values = (Vector<float>)_mm512_slli_epi32(wide, 16);
        squares += values * values;
      }
      const float norm = sum_lanes<float>(squares);
      largest = norm <= largest || largest != largest ? largest : norm;
    }
    __builtin_memset(to + count * stride_, 0, (round_up(count, STEP) - count) * stride_ * 2);
    return largest;
  }

  // Packs rows 2i and 2i + 1 as row i of pairs.
  void pack_pairs(const uint16_t* rows, int64_t count, uint32_t* pairs) const {
    for (int64_t r = 0; r < count; r += 2)
      for (int64_t d = 0; d < depth_; d += 16) {
        const auto wide = [&](int64_t row) {
          return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + row * stride_ + d)));
        };
        _mm512_storeu_si512(pairs + r / 2 * stride_ + d,
                            _mm512_or_si512(wide(r), _mm512_slli_epi32(wide(r + 1), 16)));
      }
    // The depth of a product is padded to full steps. The padding is multiplied by weights of 0, so it must not be NaN.
    for (int64_t r = round_up(count, 2) / 2; r < round_up(count, STEP) / 2; r++)
      __builtin_memset(pairs + r * stride_, 0, depth_ * 4);
  }

  // Rounds the weights to bfloat16, as they are and transposed, with zeros up to full steps.
  void round_weights(const Tile& tile, float* weights) const {
    const int64_t rows = round_up(tile.rows, STEP), columns = round_up(tile.columns, STEP);
    for (int64_t i = 0; i < rows; i++) {
      float* row = weights + i * TILE_STRIDE<float>;
      if (i >= tile.rows) __builtin_memset(row, 0, columns * 4);
      for (int64_t j = round_up(tile.columns, 16); j < columns; j++) row[j] = 0;
    }
    const auto store_rounded = [](const float* from, uint16_t* to) {
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from));
      __builtin_memcpy(to, &rounded, sizeof rounded);
    };
    for (int64_t i = 0; i < rows; i += 16)
      for (int64_t j = 0; j < columns; j += 16) {
        const float* block = weights + i * TILE_STRIDE<float> + j;
        alignas(64) float transposed[16 * 16];
        transpose_square(block, TILE_STRIDE<float>, transposed, 16);
        for (int64_t l = 0; l < 16; l++) {
          store_rounded(block + l * TILE_STRIDE<float>, weights_ + (i + l) * WEIGHT_STRIDE + j);
          store_rounded(transposed + l * 16, weights_transposed_ + (j + l) * WEIGHT_STRIDE + i);
        }
      }
  }
};

}  // namespace mcl::MCL_INSTRUCTION_SET
