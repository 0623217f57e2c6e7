// One pass of k-means: finds the nearest centre of each row, and adds the row to the centre's sum while it is in the
// cache.
#pragma once

#include "kmeans_few.h"
#include "kmeans_groups.h"

namespace mcl::MCL_INSTRUCTION_SET {

template <class T>
int64_t cluster_workspace_bytes(int64_t width) {
  Arena few(nullptr), many(nullptr);
  FewBlock<T>(few, padded_width<T>(width));
  ClusterBlock<T>(many, padded_width<T>(width));
  return larger(few.bytes(), many.bytes());
}

// Multiplies rows first .. first + rows - 1 of the block by a tile of centres, into the first rows of its products. A
// row is summed in the same order whatever its position.
template <class T>
void multiply_tile(const Clusters<T>& clusters, const PackedCenters<T>& centers, const ClusterBlock<T>& block,
                   int64_t first, int64_t rows, int64_t center, int64_t columns) {
  multiply_add<T, false>({rows, columns, clusters.width, block.rows + first * centers.stride, centers.stride,
                          centers.panels + center * centers.stride, PANEL<T>, PANEL<T> * centers.stride,
                          block.products, TILE_STRIDE<T>, false});
}

// Finds the labels of LANES rows: the centre of the lowest score of all lanes, the first one of equal scores; UNDECIDED
// if it depends on rounding.
template <class T>
void find_labels(const Clusters<T>& clusters, const PackedCenters<T>& centers, const ClusterBlock<T>& block,
                 int64_t first) {
  using V = Vector<T>;
  const LowestScores<T> found = reduce_scores(block, first);
  const ScoreErrors<T> error = score_errors(centers, clusters.width, load<V>(block.squares + first));
  const V limit = found.lowest + error(found.lowest);
  store(block.limit + first, limit);
  const Mask<T> decided = found.second - error(found.second) > limit;
  for (int64_t i = 0; i < LANES<T>; i++)
    block.labels[first + i] = decided[i] ? int64_t(centers.center_of[found.column[i]]) : UNDECIDED;
}

// Finds the centres with the lowest score |c|^2 / 2 - <x, c>.
template <class T>
void find_nearest(const Clusters<T>& clusters, const PackedCenters<T>& centers, const ClusterBlock<T>& block,
                  int64_t rows) {
  for (int64_t i = 0; i < round_up(rows, LANES<T>); i++) clear_scores(block, i);
  for (int64_t first = 0; first < centers.columns; first += TILE) {
    const int64_t columns = smaller(TILE, centers.columns - first);
    multiply_tile(clusters, centers, block, 0, round_up(rows, GROUP), first, columns);
    for (int64_t i = 0; i < rows; i++) take_scores(centers, block, i, first, first, first + columns);
  }
  for (int64_t i = 0; i < rows; i += LANES<T>) find_labels(clusters, centers, block, i);
}

// Finds the labels of the undecided rows among rows first .. first + rows - 1 of the block: the nearest, by
// differences, of the centres whose scores may be the lowest.
template <class T>
void decide(const Clusters<T>& clusters, const PackedCenters<T>& centers, const ClusterBlock<T>& block, int64_t first,
            int64_t rows) {
  Nearest<T> nearest[GROUP];
  int64_t undecided[GROUP], count = 0;
  for (int64_t i = first; i < first + rows; i++) {
    if (block.labels[i] != UNDECIDED) continue;
    nearest[count] = {exact_row(clusters, block.positions[i], block.exact + count * centers.stride),
                      block.rows + i * centers.stride, block.squares[i]};
    undecided[count++] = i;
  }
  for (int64_t tile = 0; count && tile < clusters.centers; tile += TILE) {
    const int64_t columns = smaller(TILE, centers.columns - tile);
    multiply_tile(clusters, centers, block, first, GROUP, tile, columns);
    for (int64_t u = 0; u < count; u++) {
      const int64_t i = undecided[u];
      const ScoreErrors<T> error = score_errors(centers, clusters.width, broadcast(block.squares[i]));
      for (int64_t j = 0; j < columns; j += LANES<T>) {
        const Vector<T> score = load<Vector<T>>(centers.half_norms + tile + j) -
                                load<Vector<T>>(block.products + (i - first) * TILE_STRIDE<T> + j);
        const Mask<T> far = score - error(score) > block.limit[i];
        if (every_lane<T>(far)) continue;
        for (int64_t lane = 0; lane < smaller(LANES<T>, clusters.centers - tile - j); lane++)
          if (!far[lane]) nearest[u].compare(clusters, centers, centers.center_of[tile + j + lane]);
      }
    }
  }
  for (int64_t u = 0; u < count; u++) block.labels[undecided[u]] = nearest[u].label;
}

// Loads rows into the block until it is full, from number `next` of the `count` selected rows on. Leaves out those that
// keep their label, as their bounds prove with the distance to its centre. Returns the number of rows in the block.
template <class T>
int64_t load_block(const Clusters<T>& clusters, const PackedCenters<T>& centers, const ClusterBlock<T>& block,
                   int64_t& next, int64_t count) {
  int64_t rows = 0;
  for (; next < count && rows < CLUSTER_ROWS; next++) {
    const int64_t row = block.selected[next];
    if (clusters.shifts && next + PREFETCH_ROWS < count)
      prefetch_row(clusters.rows, block.selected[next + PREFETCH_ROWS], clusters.width);
    T* x = block.rows + rows * centers.stride;
    const T squares = load_cluster_row(clusters, row, centers, x);
    block.needed[rows] = (uint32_t(1) << clusters.groups) - 1;
    block.known_label[rows] = UNDECIDED;
    if (clusters.shifts && clusters.followed[row] >= 0) {
      const T distance = distance_to_center(clusters, centers, row, x, squares, clusters.followed[row], block.exact);
      block.needed[rows] = tighten_bounds(clusters, centers, row, squares, distance);
      if (!block.needed[rows]) {
        clusters.distances[row] = distance;
        continue;
      }
      block.known_label[rows] = clusters.followed[row];
      block.known_distance[rows] = distance;
    }
    block.positions[rows] = row;
    block.squares[rows++] = squares;
  }
  for (int64_t i = rows; i < round_up(rows, LANES<T>); i++) block.squares[i] = 0;
  for (int64_t d = rows * centers.stride; d < round_up(rows, GROUP) * centers.stride; d++) block.rows[d] = 0;
  return rows;
}

// Assigns those of rows begin .. end - 1 that bounds do not decide, updates followed labels and bounds, and adds to the
// sums [levels, K, D] and counts [K] of the caller's thread unless null.
template <class T>
void cluster_rows(const Clusters<T>& clusters, char* packed, int64_t begin, int64_t end, double* sums, int64_t* counts,
                  char* workspace) {
  Arena center_arena(packed), block_arena(workspace);
  const PackedCenters<T> centers(center_arena, clusters.width, clusters.centers);
  if (clusters.centers <= FEW) {
    cluster_rows_to_few(clusters, centers, FewBlock<T>(block_arena, centers.stride), begin, end, sums, counts);
    return;
  }
  const ClusterBlock<T> block(block_arena, centers.stride);
  for (int64_t first = begin; first < end; first += SELECTED_ROWS) {
    const int64_t last = smaller(end, first + SELECTED_ROWS);
    const int64_t count = select_rows(clusters, *centers.shifts, first, last, block.selected);
    for (int64_t next = 0; next < count;) {
      const int64_t rows = load_block(clusters, centers, block, next, count);
      NextRows ahead{clusters.rows, block.selected + next, smaller(count - next, CLUSTER_ROWS),
                     clusters.width * element_bytes(clusters.rows)};
      if (clusters.upper)
        find_nearest_in_groups(clusters, centers, block, ahead, rows);
      else
        find_nearest(clusters, centers, block, rows);
      for (int64_t i = 0; i < rows; i += GROUP) decide(clusters, centers, block, i, smaller(GROUP, rows - i));
      for (int64_t i = 0; i < rows; i++) {
        ahead.prefetch(ahead.row_bytes / 64 + 1);
        const int64_t row = block.positions[i], label = block.labels[i];
        const T* x = block.rows + i * centers.stride;
        const T distance =
            label == block.known_label[i]
                ? block.known_distance[i]
                : distance_to_center(clusters, centers, row, x, block.squares[i], label, block.exact);
        clusters.distances[row] = distance;
        if (clusters.upper)
          clusters.upper[row] = upper_bound(clusters, BoundErrors::of(clusters, centers, block.squares[i]),
                                            block.squares[i], distance, T(0));
        if (clusters.labels) clusters.labels[row] = label;
        if (sums) follow_row(clusters, row, label, x, sums, counts);
        else if (clusters.followed) clusters.followed[row] = int32_t(label);
      }
    }
  }
}

}  // namespace mcl::MCL_INSTRUCTION_SET
