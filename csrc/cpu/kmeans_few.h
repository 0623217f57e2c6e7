// One pass of k-means with few centres, which is memory-bound: each row is read once, into registers.
//
// Lanes of vectors sum over features: a blocked product has a centre in each lane, and with few centres most lanes
// would be empty. The lanes of LANES rows are then added up together, and these rows find their nearest centres side by
// side.
#pragma once

#include "kmeans_bounds.h"

namespace mcl::MCL_INSTRUCTION_SET {

constexpr int64_t MOVED_ROWS = 64;  // rows that are added to the sums at a time, so that the sums are in the cache

// Rows that need no conversion are read in place, as RUNS runs side by side. The runs lie in different pages of memory,
// so the hardware prefetcher follows each of them, which is faster than prefetch instructions.
constexpr int64_t RUNS = MCL_PANEL_VECTORS == 4 ? 4 : 2;  // RUNS * FEW_AT_ONCE sums are held in registers
template <class T>
constexpr int64_t RUN_ROWS = LANES<T> / RUNS;  // rows of a block in each run

// Working memory for a block of LANES rows.
template <class T>
struct FewBlock {
  T* rows;                    // [LANES, stride]: rows that had to be converted
  T *row, *exact;             // [stride]: a single row, converted, and a copy as stored
  T *norms, *products;        // a vector of partial sums per row: of |x|^2, and of the product with each centre
  int64_t *moved, *moved_to;  // [MOVED_ROWS]: rows whose label changes, and their new labels
  int64_t* selected;          // [SELECTED_ROWS]

  FewBlock(Arena& arena, int64_t stride)
      : rows(arena.take<T>(LANES<T> * stride)),
        row(arena.take<T>(stride)),
        exact(arena.take<T>(stride)),
        norms(arena.take<T>(LANES<T> * LANES<T>)),
        products(arena.take<T>((FEW + FEW_AT_ONCE) * LANES<T> * LANES<T>)),
        moved(arena.take<int64_t>(MOVED_ROWS)),
        moved_to(arena.take<int64_t>(MOVED_ROWS)),
        selected(arena.take<int64_t>(SELECTED_ROWS)) {}
};

// Lane r of the result is the sum of vector r of COUNT, `step` elements apart. Each step of the recursion adds the
// halves of two vectors.
template <class T, int64_t COUNT = LANES<T>>
inline Vector<T> sum_vectors(const T* vectors, int64_t step = LANES<T>) {
  if constexpr (COUNT == 1) {
    return load<Vector<T>>(vectors);
  } else {
    const Vector<T> even = sum_vectors<T, COUNT / 2>(vectors, 2 * step);
    const Vector<T> odd = sum_vectors<T, COUNT / 2>(vectors + step, 2 * step);
    return interleave<T, 0>(even, odd) + interleave<T, 1>(even, odd);
  }
}

// The rows of a block, the offset that is subtracted from them, and rows to be prefetched into the second-level cache,
// whose elements have `element` bytes. Row i of run r is row i + r RUN_ROWS of the block.
template <class T>
struct FewRows {
  const T *rows[LANES<T>], *offset;
  const char* next[LANES<T>];
  int64_t element;
};

// Multiplies row i of each run by FEW_AT_ONCE centres, and by itself with the FIRST ones. Prefetches FETCHED rows from
// number `next` on.
template <class T, bool FIRST, int64_t FETCHED>
inline void multiply_few(const FewRows<T>& x, int64_t i, int64_t width, const T* centers, int64_t stride, int64_t next,
                         T* norms, T* products) {
  using V = Vector<T>;
  V sums[RUNS][FEW_AT_ONCE] = {}, squares[RUNS] = {};
  const T* rows[RUNS];
  const char* fetched[RUNS];
  for (int64_t r = 0; r < RUNS; r++) rows[r] = x.rows[i + r * RUN_ROWS<T>];
  for (int64_t r = 0; r < FETCHED; r++) fetched[r] = x.next[next + r];
  for (int64_t d = 0; d < width; d += LANES<T>) {
    V entries[RUNS];
    const V offset = load<V>(x.offset + d);
#pragma GCC unroll 4
    for (int64_t r = 0; r < RUNS; r++) {
      entries[r] = load<V>(rows[r] + d) - offset;
      if (FIRST) squares[r] += entries[r] * entries[r];
      if (r < FETCHED) __builtin_prefetch(fetched[r] + d * x.element, 0, 2);
    }
#pragma GCC unroll 5
    for (int64_t j = 0; j < FEW_AT_ONCE; j++) {
      const V c = load<V>(centers + j * stride + d);
#pragma GCC unroll 4
      for (int64_t r = 0; r < RUNS; r++) sums[r][j] += entries[r] * c;
    }
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < RUNS; r++) {
    T* to = products + (i + r * RUN_ROWS<T>) * LANES<T>;
    if (FIRST) store(norms + (i + r * RUN_ROWS<T>) * LANES<T>, squares[r]);
#pragma GCC unroll 5
    for (int64_t j = 0; j < FEW_AT_ONCE; j++) store(to + j * LANES<T> * LANES<T>, sums[r][j]);
  }
}

// Multiplies a block of rows by all centres. Each group of centres prefetches FETCHED of RUNS rows: half of them if
// there are several groups.
template <class T, int64_t FETCHED>
void multiply_block(const Clusters<T>& clusters, const PackedCenters<T>& centers, const FewRows<T>& x,
                    const FewBlock<T>& block) {
  const int64_t width = round_up(clusters.width, LANES<T>), stride = centers.stride;
  for (int64_t i = 0; i < RUN_ROWS<T>; i++) {
    multiply_few<T, true, FETCHED>(x, i, width, centers.rows, stride, i * RUNS, block.norms, block.products);
    for (int64_t j = FEW_AT_ONCE; j < clusters.centers; j += FEW_AT_ONCE)
      multiply_few<T, false, FETCHED>(x, i, width, centers.rows + j * stride, stride, i * RUNS + FETCHED % RUNS,
                                      nullptr, block.products + j * LANES<T> * LANES<T>);
  }
}

// Assigns and adds rows begin .. end - 1, or those of them in `selected` unless it is null, with at most FEW centres.
template <class T>
void cluster_few(const Clusters<T>& clusters, const PackedCenters<T>& centers, const FewBlock<T>& block,
                 const int64_t* selected, int64_t begin, int64_t end, double* sums, int64_t* counts) {
  using V = Vector<T>;
  const int64_t stride = centers.stride;
  const bool plain = rows_are_plain(clusters) && clusters.width % LANES<T> == 0;
  const int64_t in_place = plain ? (end - begin) / LANES<T> : 0;  // number of blocks read in place; others are copied
  int64_t moved = 0;
  const auto follow_moved = [&] {
    for (int64_t i = 0; i < moved; i++) {
      load_cluster_row(clusters, block.moved[i], centers, block.row);
      follow_row(clusters, block.moved[i], block.moved_to[i], block.row, sums, counts);
    }
    moved = 0;
  };
  for (int64_t b = 0; begin + b * LANES<T> < end; b++) {
    const bool copied = b >= in_place, in_runs = !copied && !selected;
    const int64_t first = begin + b * (in_runs ? RUN_ROWS<T> : LANES<T>);
    const int64_t rows = copied ? smaller(LANES<T>, end - first) : LANES<T>;
    const int64_t run = in_runs ? RUN_ROWS<T> * in_place : RUN_ROWS<T>;
    const auto row_at = [&](int64_t i) {
      const int64_t position = first + i % RUN_ROWS<T> + i / RUN_ROWS<T> * run;
      return selected ? selected[position] : position;
    };
    FewRows<T> x;
    x.offset = copied ? centers.zeros : centers.offset;
    x.element = element_bytes(clusters.rows);
    for (int64_t i = 0; i < LANES<T>; i++) {
      x.rows[i] = copied ? block.rows + i * stride : reinterpret_cast<const T*>(address_of(clusters.rows, row_at(i)));
      const int64_t next = smaller(first + LANES<T> + i, end - 1);
      x.next[i] = address_of(clusters.rows, selected ? selected[next] : next);
    }
    if (copied) {
      for (int64_t i = 0; i < rows; i++) load_cluster_row(clusters, row_at(i), centers, block.rows + i * stride);
      for (int64_t d = rows * stride; d < LANES<T> * stride; d++) block.rows[d] = 0;
    }
    if (in_runs)
      multiply_block<T, 0>(clusters, centers, x, block);
    else if (clusters.centers <= FEW_AT_ONCE)
      multiply_block<T, RUNS>(clusters, centers, x, block);
    else
      multiply_block<T, RUNS / 2>(clusters, centers, x, block);
    // Equal scores go to the lowest index.
    V score = broadcast(T(__builtin_inf())), second = score, center{};
    for (int64_t j = 0; j < clusters.centers; j++) {
      const V s = centers.half_norms[j] - sum_vectors<T>(block.products + j * LANES<T> * LANES<T>);
      center = s < score ? broadcast(T(j)) : center;
      take_lowest(s, score, second);
    }
    const V norms = sum_vectors<T>(block.norms);
    const V distances = clusters.cosine ? 1 + score : norms + 2 * score;
    const ScoreErrors<T> error = score_errors(centers, clusters.width, norms);
    const Mask<T> decided = second - score > error(score) + error(second);
    const Mask<T> accurate = decided & (distances >= norms / NEAR_BY_PRODUCT);
    T distance[LANES<T>], label[LANES<T>];
    store(distance, distances);
    store(label, center);
    for (int64_t i = 0; !every_lane<T>(accurate) && i < rows; i++) {
      if (accurate[i]) continue;
      const int64_t row = row_at(i);
      const T* x = copied ? block.rows + i * stride : block.row;
      const T squares = copied ? norms[i] : load_cluster_row(clusters, row, centers, block.row);
      if (!decided[i]) {
        Nearest<T> nearest{exact_row(clusters, row, block.exact), x, squares};
        for (int64_t j = 0; j < clusters.centers; j++) nearest.compare(clusters, centers, j);
        label[i] = T(nearest.label);
      }
      distance[i] = distance_to_center(clusters, centers, row, x, squares, int64_t(label[i]), block.exact);
    }
    const V score_error = 2 * error(score), lowest = score - error(score), others = second - error(second);
    for (int64_t i = 0; i < rows; i++) {
      const int64_t row_label = int64_t(label[i]), row = row_at(i);
      clusters.distances[row] = distance[i];
      if (clusters.upper) {
        const BoundErrors errors = BoundErrors::of(clusters, centers, norms[i]);
        clusters.upper[row] = upper_bound(clusters, errors, norms[i], distance[i], score_error[i]);
        clusters.lower[row] = lower_bound(clusters, errors, norms[i], decided[i] ? others[i] : lowest[i]);
      }
      if (clusters.labels) clusters.labels[row] = row_label;
      if (!sums && clusters.followed) clusters.followed[row] = int32_t(row_label);
      if (!sums || (clusters.followed && clusters.followed[row] == row_label)) continue;
      block.moved[moved] = row;
      block.moved_to[moved++] = row_label;
      if (moved == MOVED_ROWS) follow_moved();
    }
  }
  follow_moved();
}

// Assigns and adds rows like cluster_rows, with at most FEW centres.
template <class T>
void cluster_rows_to_few(const Clusters<T>& clusters, const PackedCenters<T>& centers, const FewBlock<T>& block,
                         int64_t begin, int64_t end, double* sums, int64_t* counts) {
  for (int64_t first = begin; first < end; first += SELECTED_ROWS) {
    const int64_t last = smaller(end, first + SELECTED_ROWS);
    const int64_t count =
        clusters.shifts ? select_rows(clusters, *centers.shifts, first, last, block.selected) : last - first;
    // Nearly all rows are read faster in place.
    if (4 * count > 3 * (last - first))
      cluster_few(clusters, centers, block, nullptr, first, last, sums, counts);
    else
      cluster_few(clusters, centers, block, block.selected, 0, count, sums, counts);
  }
}

}  // namespace mcl::MCL_INSTRUCTION_SET
