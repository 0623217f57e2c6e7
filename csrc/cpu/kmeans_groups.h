// The nearest centres of rows by groups of centres: a row is compared with the groups whose lower bound is not above
// its upper bound (Ding et al. 2015, Yinyang k-means), and with that of its label.
#pragma once

#include "kmeans_block.h"

namespace mcl::MCL_INSTRUCTION_SET {

// Multiplies the listed rows of the block by columns first .. end - 1, at most TILE of them, into its products: row i
// of the list at row i. The list is padded to GROUP. The order of each sum is that of multiply_tile.
template <class T>
void multiply_listed(const Clusters<T>& clusters, const PackedCenters<T>& centers, const ClusterBlock<T>& block,
                     NextRows& ahead, int64_t count, int64_t first, int64_t end) {
  const int64_t passes = (clusters.width + DEPTH - 1) / DEPTH;
  for (int64_t pass = 0; pass < passes; pass++) {
    const int64_t k = clusters.width * pass / passes, depth = clusters.width * (pass + 1) / passes - k;
    for (int64_t j = first; j < end;) {
      const int64_t in_panel = j % PANEL<T>, columns = smaller(PANEL<T> - in_panel, end - j);
      const T* b = centers.panels + (j - in_panel) * centers.stride + k * PANEL<T> + in_panel;
      for (int64_t i = 0; i < count; i += GROUP) {
        const T* rows[GROUP];
        for (int64_t r = 0; r < GROUP; r++) rows[r] = block.rows + block.listed[i + r] * centers.stride + k;
        ahead.prefetch(PREFETCHED_LINES);
        multiply_group<T>(columns / LANES<T>, pass > 0, depth, [rows](int row, int64_t d) { return rows[row][d]; }, b,
                          PANEL<T>, block.products + i * TILE_STRIDE<T> + j - first, TILE_STRIDE<T>);
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

// Compares all rows of the block with the groups that nearly all of them need: such groups that follow one another are
// multiplied at once. Returns a bit for each of these groups.
template <class T>
uint32_t widen_needed(const ClusterBlock<T>& block, int64_t groups, int64_t rows) {
  uint32_t everywhere = 0;
  for (int64_t g = 0; g < groups; g++) {
    int64_t count = 0;
    for (int64_t i = 0; i < rows; i++) count += block.needed[i] >> g & 1;
    if (4 * count > 3 * rows) everywhere |= uint32_t(1) << g;
  }
  for (int64_t i = 0; i < rows; i++) block.needed[i] |= everywhere;
  return everywhere;
}

// Lists the rows of the block that are compared with a group, padded to GROUP. Returns their number.
template <class T>
int64_t list_rows(const ClusterBlock<T>& block, int64_t group, int64_t rows) {
  int64_t count = 0;
  for (int64_t i = 0; i < rows; i++)
    if (block.needed[i] >> group & 1) block.listed[count++] = i;
  for (int64_t p = count; p < round_up(count, GROUP); p++) block.listed[p] = block.listed[count - 1];
  return count;
}

// Finds the labels of the block's rows, UNDECIDED if one depends on rounding, each from the groups of `needed`; and the
// lower bounds of these groups.
template <class T>
void find_nearest_in_groups(const Clusters<T>& clusters, const PackedCenters<T>& centers, const ClusterBlock<T>& block,
                            NextRows& ahead, int64_t rows) {
  const Groups<T> groups(centers.columns, clusters.groups);
  TwoLowest<T> nearest[CLUSTER_ROWS];
  T second_in_group[CLUSTER_ROWS];
  for (int64_t i = 0; i < rows; i++) {
    nearest[i] = {T(__builtin_inf()), T(__builtin_inf()), 0};
    second_in_group[i] = T(__builtin_inf());
  }
  const uint32_t everywhere = widen_needed(block, groups.groups, rows);
  int64_t tile = 0, tile_end = 0;  // the columns whose products are in the block
  for (int64_t g = 0; g < groups.groups; g++) {
    const int64_t count = list_rows(block, g, rows), begin = groups.begin(g), end = groups.begin(g + 1);
    if (count == 0) continue;
    int64_t run = g + 1;
    while (run < groups.groups && everywhere >> g & everywhere >> run & 1) run++;
    for (int64_t p = 0; p < round_up(count, LANES<T>); p++) clear_scores(block, p);
    for (int64_t first = begin; first < end; first = smaller(end, tile_end)) {
      if (first >= tile_end) {
        tile = first;
        tile_end = smaller(groups.begin(run), first + TILE);
        multiply_listed(clusters, centers, block, ahead, round_up(count, GROUP), tile, tile_end);
      }
      for (int64_t p = 0; p < count; p++) take_scores(centers, block, p, tile, first, smaller(end, tile_end));
    }
    for (int64_t p = 0; p < count; p += LANES<T>) {
      const LowestScores<T> found = reduce_scores(block, p);
      for (int64_t lane = 0; lane < smaller(LANES<T>, count - p); lane++) {
        const int64_t i = block.listed[p + lane];
        const T lowest = found.lowest[lane], second = found.second[lane];
        block.group_scores[i * MAX_GROUPS + g] = lowest;
        if (lowest < nearest[i].lowest) {
          second_in_group[i] = second;
          nearest[i] = {lowest, smaller(nearest[i].lowest, second), centers.center_of[found.column[lane]]};
        } else {
          nearest[i].second = smaller(nearest[i].second, lowest);
        }
      }
    }
  }
  for (int64_t i = 0; i < rows; i++) {
    const RowErrors<T> error = score_errors(centers, clusters.width, block.squares[i]);
    block.limit[i] = nearest[i].lowest + error(nearest[i].lowest);
    const bool decided = nearest[i].second - error(nearest[i].second) > block.limit[i];
    block.labels[i] = decided ? nearest[i].center : UNDECIDED;
    T* scores = block.group_scores + i * MAX_GROUPS;
    if (decided) scores[centers.group_of[nearest[i].center]] = second_in_group[i];
    const BoundErrors errors = BoundErrors::of(clusters, centers, block.squares[i]);
    float* lower = clusters.lower + block.positions[i] * clusters.groups;
    for (int64_t g = 0; g < groups.groups; g++)
      if (block.needed[i] >> g & 1)
        lower[g] = lower_bound(clusters, errors, block.squares[i], scores[g] - error(scores[g]));
  }
}

}  // namespace mcl::MCL_INSTRUCTION_SET
