// One pass of k-means to few centres, which memory bounds: a row is touched once, in registers.
//
// The features are summed in the lanes of vectors, where a product of blocks would fill its lanes with centres that are
// not there. The sums of LANES rows are then added up together, and these rows find their nearest centre side by side.
#pragma once

#include "centers.h"

namespace mcl::MCL_INSTRUCTION_SET {

constexpr int64_t FEW = 16;
constexpr int64_t MOVED_ROWS = 64;  // are added to the sums at a time, so that these are in the cache

// Rows that need no change are read where they are, as RUNS runs side by side. The runs lie in different pages of
// memory, so the processor's own prefetching follows each of them, faster than instructions could fetch them.
constexpr int64_t RUNS = MCL_PANEL_VECTORS == 4 ? 4 : 2;  // RUNS * FEW_AT_ONCE sums are held in registers
template <class T>
constexpr int64_t OF_A_RUN = LANES<T> / RUNS;  // rows of a block

// Copies of LANES rows that need some change, and of a single row, changed and as it is; for |x|^2 and each centre a vector of sums per row;
// and which rows move to another centre, and to which.
template <class T>
struct FewBlock {
  T *rows, *row, *exact, *norms, *products;
  int64_t *moved, *moved_to;

  FewBlock(Arena& arena, int64_t stride)
      : rows(arena.take<T>(LANES<T> * stride)),
        row(arena.take<T>(stride)),
        exact(arena.take<T>(stride)),
        norms(arena.take<T>(LANES<T> * LANES<T>)),
        products(arena.take<T>((FEW + FEW_AT_ONCE) * LANES<T> * LANES<T>)),
        moved(arena.take<int64_t>(MOVED_ROWS)),
        moved_to(arena.take<int64_t>(MOVED_ROWS)) {}
};

// Lane r of the result is the sum of vector r of COUNT, which lie `step` apart: each step joins the halves of two.
template <class T, int64_t COUNT = LANES<T>>
inline Vector<T> sums_of_vectors(const T* vectors, int64_t step = LANES<T>) {
  if constexpr (COUNT == 1) {
    return load<Vector<T>>(vectors);
  } else {
    const Vector<T> even = sums_of_vectors<T, COUNT / 2>(vectors, 2 * step);
    const Vector<T> odd = sums_of_vectors<T, COUNT / 2>(vectors + step, 2 * step);
    return interleave<T, 0>(even, odd) + interleave<T, 1>(even, odd);
  }
}

// Rows as they lie in memory, and what they are relative to.
template <class T>
struct FewRows {
  const T *rows, *offset;
  int64_t stride, run;  // in rows, from one run to the next
};

// Rows that come next, to be fetched into the second-level cache; in bytes.
struct NextRows {
  const char* rows;
  int64_t stride, element;
};

// Row i of each run times FEW_AT_ONCE centres, with the first of which comes |x|^2. Meanwhile FETCHED rows are fetched.
template <class T, bool FIRST, int64_t FETCHED>
inline void multiply_few(const FewRows<T>& x, int64_t i, int64_t width, const T* centers, int64_t stride,
                         const NextRows& next, T* norms, T* products) {
  using V = Vector<T>;
  V sums[RUNS][FEW_AT_ONCE] = {}, squares[RUNS] = {};
  for (int64_t d = 0; d < width; d += LANES<T>) {
    V entries[RUNS];
    const V offset = load<V>(x.offset + d);
#pragma GCC unroll 4
    for (int64_t r = 0; r < RUNS; r++) {
      entries[r] = load<V>(x.rows + (i + r * x.run) * x.stride + d) - offset;
      if (FIRST) squares[r] += entries[r] * entries[r];
      if (r < FETCHED) __builtin_prefetch(next.rows + r * next.stride + d * next.element, 0, 2);
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
    T* to = products + (i + r * OF_A_RUN<T>) * LANES<T>;
    if (FIRST) store(norms + (i + r * OF_A_RUN<T>) * LANES<T>, squares[r]);
#pragma GCC unroll 5
    for (int64_t j = 0; j < FEW_AT_ONCE; j++) store(to + j * LANES<T> * LANES<T>, sums[r][j]);
  }
}

// A block of rows times all centres.
template <class T, int64_t FETCHED>
void multiply_block(const Clusters<T>& clusters, const PackedCenters<T>& centers, const FewRows<T>& x, int64_t next,
                    const FewBlock<T>& block) {
  const int64_t width = round_up(clusters.width, LANES<T>), stride = centers.stride;
  const int64_t element = element_bytes(clusters.rows), next_stride = clusters.rows.row_stride * element;
  for (int64_t i = 0; i < OF_A_RUN<T>; i++) {
    NextRows fetched = {address_of(clusters.rows, next) + i * RUNS * next_stride, next_stride, element};
    multiply_few<T, true, FETCHED>(x, i, width, centers.rows, stride, fetched, block.norms, block.products);
    fetched.rows += FETCHED % RUNS * next_stride;
    for (int64_t j = FEW_AT_ONCE; j < clusters.centers; j += FEW_AT_ONCE)
      multiply_few<T, false, FETCHED>(x, i, width, centers.rows + j * stride, stride, fetched, nullptr,
                                      block.products + j * LANES<T> * LANES<T>);
  }
}

// As cluster_rows.
template <class T>
void cluster_rows_to_few(const Clusters<T>& clusters, const PackedCenters<T>& centers, const FewBlock<T>& block,
                         int64_t begin, int64_t end, double* sums, int64_t* counts) {
  using V = Vector<T>;
  const int64_t stride = centers.stride;
  const bool plain = rows_are_plain(clusters) && clusters.width % LANES<T> == 0;
  const int64_t in_place = plain ? (end - begin) / LANES<T> : 0;  // blocks; rows of the others are copied
  int64_t moved = 0;
  const auto follow_moved = [&] {
    for (int64_t i = 0; i < moved; i++) {
      load_cluster_row(clusters, block.moved[i], centers, block.row);
      follow_row(clusters, block.moved[i], block.moved_to[i], block.row, sums, counts);
    }
    moved = 0;
  };
  for (int64_t b = 0; begin + b * LANES<T> < end; b++) {
    const bool copied = b >= in_place;
    const int64_t first = begin + b * (copied ? LANES<T> : OF_A_RUN<T>);
    const int64_t rows = copied ? smaller(LANES<T>, end - first) : LANES<T>;
    const int64_t run = OF_A_RUN<T> * (copied ? 1 : in_place);
    if (copied) {
      for (int64_t i = 0; i < rows; i++) load_cluster_row(clusters, first + i, centers, block.rows + i * stride);
      for (int64_t at = rows * stride; at < LANES<T> * stride; at++) block.rows[at] = 0;
      // The next ones are fetched at one rate: all of them beside a single group of centres, half beside each of two.
      const int64_t next = first + 2 * LANES<T> <= end ? first + LANES<T> : first;
      const FewRows<T> x = {block.rows, centers.zeros, stride, run};
      if (clusters.centers <= FEW_AT_ONCE)
        multiply_block<T, RUNS>(clusters, centers, x, next, block);
      else
        multiply_block<T, RUNS / 2>(clusters, centers, x, next, block);
    } else {
      const T* here = reinterpret_cast<const T*>(address_of(clusters.rows, first));
      multiply_block<T, 0>(clusters, centers, {here, centers.offset, clusters.rows.row_stride, run}, first, block);
    }
    // Of equal scores the lowest index.
    V score = broadcast(T(__builtin_inf())), second = score, center{};
    for (int64_t j = 0; j < clusters.centers; j++) {
      const V s = centers.half_norms[j] - sums_of_vectors<T>(block.products + j * LANES<T> * LANES<T>);
      center = s < score ? broadcast(T(j)) : center;
      take_lowest(s, score, second);
    }
    const V norms = sums_of_vectors<T>(block.norms);
    const V distances = clusters.cosine ? 1 + score : norms + 2 * score;
    const ScoreErrors<T> error = score_errors(centers, clusters.width, norms);
    const Mask<T> decided = second - score > error(score) + error(second);
    const Mask<T> right = decided & (distances >= norms / NEAR_BY_PRODUCT);
    T distance[LANES<T>], label[LANES<T>];
    store(distance, distances);
    store(label, center);
    for (int64_t i = 0; !every_lane<T>(right) && i < rows; i++) {
      if (right[i]) continue;
      const int64_t row = first + i % OF_A_RUN<T> + i / OF_A_RUN<T> * run;
      const T* x = copied ? block.rows + i * stride : block.row;
      const T squares = copied ? norms[i] : load_cluster_row(clusters, row, centers, block.row);
      if (!decided[i]) {
        Nearest<T> nearest{exact_row(clusters, row, block.exact), x, squares};
        for (int64_t j = 0; j < clusters.centers; j++) nearest.compare(clusters, centers, j);
        label[i] = T(nearest.label);
      }
      distance[i] = distance_to_center(clusters, centers, row, x, squares, int64_t(label[i]), block.exact);
    }
    for (int64_t i = 0; i < rows; i++) {
      const int64_t label_of_row = int64_t(label[i]), row = first + i % OF_A_RUN<T> + i / OF_A_RUN<T> * run;
      clusters.distances[row] = distance[i];
      if (clusters.labels) clusters.labels[row] = label_of_row;
      if (!sums || (clusters.followed && clusters.followed[row] == label_of_row)) continue;
      block.moved[moved] = row;
      block.moved_to[moved++] = label_of_row;
      if (moved == MOVED_ROWS) follow_moved();
    }
  }
  follow_moved();
}

}  // namespace mcl::MCL_INSTRUCTION_SET
