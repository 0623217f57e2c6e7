// A block of rows that are compared with many centres.
#pragma once

#include "kmeans_bounds.h"

namespace mcl::MCL_INSTRUCTION_SET {

constexpr int64_t CLUSTER_ROWS = 96;  // rows of a block: a multiple of GROUP, fits the cache with a tile of centres

// A block of rows, their products with a tile of centres, and the nearest centres so far. The number of rows is padded
// to full vectors.
template <class T>
struct ClusterBlock {
  T *rows, *exact;     // [rows, stride]; [GROUP, stride]: copies of rows whose label depends on rounding
  T* products;
  T *score, *second;   // [rows, LANES]: the two lowest scores of each lane, which visits its centres in ascending order
  Index<T>* center;    // [rows, LANES]: the centre of the lowest score
  T *squares, *limit;  // [rows]: |x|^2; upper bound of the lowest score, rounding included
  T* known_distance;            // [rows]: to the centre of `known_label`
  int64_t* known_label;         // [rows]: the label before, UNDECIDED for none
  int64_t *labels, *positions;  // [rows]: labels, and which rows of the data they are
  int64_t* selected;            // [SELECTED_ROWS]
  int64_t* listed;              // [rows]: rows of the block that a group of centres is compared with
  uint32_t* needed;             // [rows]: a bit for each group of centres that the row is compared with
  T* group_scores;              // [rows, MAX_GROUPS]: the lowest score of each of them, without that of the label

  ClusterBlock(Arena& arena, int64_t stride)
      : rows(arena.take<T>(CLUSTER_ROWS * stride)),
        exact(arena.take<T>(GROUP * stride)),
        products(arena.take<T>(CLUSTER_ROWS * TILE_STRIDE<T>)),
        score(arena.take<T>(CLUSTER_ROWS * LANES<T>)),
        second(arena.take<T>(CLUSTER_ROWS * LANES<T>)),
        center(arena.take<Index<T>>(CLUSTER_ROWS * LANES<T>)),
        squares(arena.take<T>(CLUSTER_ROWS)),
        limit(arena.take<T>(CLUSTER_ROWS)),
        known_distance(arena.take<T>(CLUSTER_ROWS)),
        known_label(arena.take<int64_t>(CLUSTER_ROWS)),
        labels(arena.take<int64_t>(CLUSTER_ROWS)),
        positions(arena.take<int64_t>(CLUSTER_ROWS)),
        selected(arena.take<int64_t>(SELECTED_ROWS)),
        listed(arena.take<int64_t>(CLUSTER_ROWS)),
        needed(arena.take<uint32_t>(CLUSTER_ROWS)),
        group_scores(arena.take<T>(CLUSTER_ROWS * MAX_GROUPS)) {}
};

// Rows of the next block, which are prefetched into the second-level cache while this one is computed.
struct NextRows {
  const Matrix& rows;
  const int64_t* selected;
  int64_t count, row_bytes;
  int64_t next = 0, byte = 0;

  void prefetch(int64_t lines) {
    for (; lines > 0 && next < count; lines--) {
      __builtin_prefetch(address_of(rows, selected[next]) + byte, 0, 2);
      byte += 64;
      if (byte >= row_bytes) byte = 0, next++;
    }
  }
};

constexpr int64_t PREFETCHED_LINES = 32;  // with each call of a micro-kernel

// Forgets the lowest scores of a row.
template <class T>
void clear_scores(const ClusterBlock<T>& block, int64_t row) {
  store(block.score + row * LANES<T>, broadcast(T(__builtin_inf())));
  store(block.second + row * LANES<T>, broadcast(T(__builtin_inf())));
  store(block.center + row * LANES<T>, Mask<T>{});
}

// Updates the lowest scores of a row, |c|^2 / 2 - <x, c>, with columns first .. end - 1 of the centres. The products of
// the row begin with those of column `tile`.
template <class T>
void take_scores(const PackedCenters<T>& centers, const ClusterBlock<T>& block, int64_t row, int64_t tile,
                 int64_t first, int64_t end) {
  using V = Vector<T>;
  Mask<T> lanes;
  for (int64_t lane = 0; lane < LANES<T>; lane++) lanes[lane] = Index<T>(lane);
  V score = load<V>(block.score + row * LANES<T>), second = load<V>(block.second + row * LANES<T>);
  Mask<T> center = load<Mask<T>>(block.center + row * LANES<T>);
  for (int64_t j = first; j < end; j += LANES<T>) {
    const V s = load<V>(centers.half_norms + j) - load<V>(block.products + row * TILE_STRIDE<T> + j - tile);
    center = s < score ? lanes + Index<T>(j) : center;
    take_lowest(s, score, second);
  }
  store(block.score + row * LANES<T>, score);
  store(block.second + row * LANES<T>, second);
  store(block.center + row * LANES<T>, center);
}

// The two lowest scores of LANES rows, a row in each lane, and the column of the lowest: the first one of equal scores.
template <class T>
struct LowestScores {
  Vector<T> lowest, second;
  Mask<T> column;
};

// Reduces the scores of rows first .. first + LANES - 1 of the block.
template <class T>
LowestScores<T> reduce_scores(const ClusterBlock<T>& block, int64_t first) {
  using V = Vector<T>;
  // Rows become lanes.
  T scores[LANES<T> * LANES<T>], seconds[LANES<T> * LANES<T>], columns[LANES<T> * LANES<T>];
  transpose_square(block.score + first * LANES<T>, LANES<T>, scores, LANES<T>);
  transpose_square(block.second + first * LANES<T>, LANES<T>, seconds, LANES<T>);
  transpose_square(reinterpret_cast<const T*>(block.center + first * LANES<T>), LANES<T>, columns, LANES<T>);
  LowestScores<T> found = {load<V>(scores), load<V>(seconds), load<Mask<T>>(columns)};
  for (int64_t lane = 1; lane < LANES<T>; lane++) {
    const V s = load<V>(scores + lane * LANES<T>), next = load<V>(seconds + lane * LANES<T>);
    const Mask<T> column = load<Mask<T>>(columns + lane * LANES<T>);
    found.column = (s < found.lowest) | ((s == found.lowest) & (column < found.column)) ? column : found.column;
    take_lowest(s, found.lowest, found.second);
    found.second = next < found.second ? next : found.second;
  }
  return found;
}

constexpr int64_t UNDECIDED = -1;  // the label of a row if another one is possible within rounding

}  // namespace mcl::MCL_INSTRUCTION_SET
