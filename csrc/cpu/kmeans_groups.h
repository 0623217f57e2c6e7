// The nearest centres of rows by groups of centres: a row is compared with the groups whose lower bound is not above
// its upper bound (Ding et al. 2015, Yinyang k-means), and with that of its label.
#pragma once

#include "kmeans_block.h"

namespace mcl::MCL_INSTRUCTION_SET {

// Multiplies GROUP rows by VECTORS vectors of columns, or adds the products.
template <class T, int VECTORS>
inline void multiply_group(bool accumulate, int64_t depth, const T* const* rows, const T* b, T* c) {
  using V = Vector<T>;
  V sums[GROUP][VECTORS] = {};
  const T* a[GROUP];
#pragma GCC unroll 6
  for (int i = 0; i < GROUP; i++) a[i] = rows[i];
  for (int64_t k = 0; k < depth; k++) {
    V row[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) row[v] = load<V>(b + k * PANEL<T> + v * LANES<T>);
#pragma GCC unroll 6
    for (int i = 0; i < GROUP; i++) {
      const V factor = broadcast(a[i][k]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sums[i][v] += factor * row[v];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < GROUP; i++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      T* to = c + i * TILE_STRIDE<T> + v * LANES<T>;
      store(to, accumulate ? load<V>(to) + sums[i][v] : sums[i][v]);
    }
}

// Multiplies the listed rows of the block by columns first .. end - 1, at most TILE of them, into its products: row i
// of the list at row i. The list is padded to GROUP. The order of each sum is that of multiply_tile.
template <class T>
void multiply_listed(const Clusters<T>& clusters, const PackedCenters<T>& centers, const ClusterBlock<T>& block,
                     int64_t count, int64_t first, int64_t end) {
  const int64_t passes = (clusters.width + DEPTH - 1) / DEPTH;
  for (int64_t pass = 0; pass < passes; pass++) {
    const int64_t k = clusters.width * pass / passes, depth = clusters.width * (pass + 1) / passes - k;
    for (int64_t j = first; j < end;) {
      const int64_t in_panel = j % PANEL<T>, columns = smaller(PANEL<T> - in_panel, end - j);
      const T* b = centers.panels + (j - in_panel) * centers.stride + k * PANEL<T> + in_panel;
      for (int64_t i = 0; i < count; i += GROUP) {
        const T* rows[GROUP];
        for (int64_t r = 0; r < GROUP; r++) rows[r] = block.rows + block.listed[i + r] * centers.stride + k;
        T* c = block.products + i * TILE_STRIDE<T> + j - first;
        switch (columns / LANES<T>) {
          case 1: multiply_group<T, 1>(pass > 0, depth, rows, b, c); break;
          case 2: multiply_group<T, 2>(pass > 0, depth, rows, b, c); break;
#if MCL_PANEL_VECTORS == 4
          case 3: multiply_group<T, 3>(pass > 0, depth, rows, b, c); break;
          case 4: multiply_group<T, 4>(pass > 0, depth, rows, b, c); break;
#endif
        }
      }
      j += columns;
    }
  }
}

// The two lowest scores of a row so far, and the centre of the lowest.
template <class T>
struct TwoLowest {
  T lowest, second;
  int64_t center;
};

// Reduces the lanes of a row, which visited their centres in ascending order.
template <class T>
TwoLowest<T> reduce_lanes(const T* scores, const T* seconds, const Index<T>* centers) {
  TwoLowest<T> found = {T(__builtin_inf()), T(__builtin_inf()), 0};
  for (int64_t lane = 0; lane < LANES<T>; lane++) {
    const T s = scores[lane];
    if (s < found.lowest || (s == found.lowest && centers[lane] < found.center)) {
      found.second = smaller(found.lowest, found.second);
      found.lowest = s;
      found.center = centers[lane];
    } else {
      found.second = smaller(found.second, s);
    }
    found.second = smaller(found.second, seconds[lane]);
  }
  return found;
}

// Finds the labels of the block's rows, UNDECIDED if one depends on rounding, each from the groups of `needed`; and the
// lower bounds of these groups.
template <class T>
void find_nearest_in_groups(const Clusters<T>& clusters, const PackedCenters<T>& centers, const Groups<T>& groups,
                            const ClusterBlock<T>& block, int64_t rows) {
  TwoLowest<T> nearest[CLUSTER_ROWS];
  T second_in_group[CLUSTER_ROWS];
  for (int64_t i = 0; i < rows; i++) {
    nearest[i] = {T(__builtin_inf()), T(__builtin_inf()), 0};
    second_in_group[i] = T(__builtin_inf());
  }
  for (int64_t g = 0; g < groups.groups; g++) {
    int64_t count = 0;
    for (int64_t i = 0; i < rows; i++)
      if (block.needed[i] >> g & 1) block.listed[count++] = i;
    if (count == 0) continue;
    for (int64_t p = count; p < round_up(count, GROUP); p++) block.listed[p] = block.listed[count - 1];
    for (int64_t p = 0; p < count; p++) clear_scores(block, p);
    const int64_t end = groups.begin(g + 1);
    for (int64_t first = groups.begin(g); first < end; first += TILE) {
      const int64_t columns = smaller(TILE, end - first);
      multiply_listed(clusters, centers, block, round_up(count, GROUP), first, first + columns);
      for (int64_t p = 0; p < count; p++) take_scores(centers, block, p, first, columns);
    }
    for (int64_t p = 0; p < count; p++) {
      const int64_t i = block.listed[p];
      const TwoLowest<T> found =
          reduce_lanes<T>(block.score + p * LANES<T>, block.second + p * LANES<T>, block.center + p * LANES<T>);
      block.group_scores[i * MAX_GROUPS + g] = found.lowest;
      if (found.lowest < nearest[i].lowest) {
        second_in_group[i] = found.second;
        nearest[i] = {found.lowest, smaller(nearest[i].lowest, found.second), found.center};
      } else {
        nearest[i].second = smaller(nearest[i].second, found.lowest);
      }
    }
  }
  for (int64_t i = 0; i < rows; i++) {
    const RowErrors<T> error = score_errors(centers, clusters.width, block.squares[i]);
    block.limit[i] = nearest[i].lowest + error(nearest[i].lowest);
    const bool decided = nearest[i].second - error(nearest[i].second) > block.limit[i];
    block.labels[i] = decided ? nearest[i].center : UNDECIDED;
    T* scores = block.group_scores + i * MAX_GROUPS;
    if (decided) scores[groups.of(nearest[i].center)] = second_in_group[i];
    const BoundErrors errors = BoundErrors::of(clusters, centers, block.squares[i]);
    float* lower = clusters.lower + block.positions[i] * clusters.groups;
    for (int64_t g = 0; g < groups.groups; g++)
      if (block.needed[i] >> g & 1)
        lower[g] = lower_bound(clusters, errors, block.squares[i], scores[g] - error(scores[g]));
  }
}

}  // namespace mcl::MCL_INSTRUCTION_SET
