// Centres as a pass of k-means needs them; a row and its centre.
#pragma once

#include "arena.h"
#include "packing.h"
#include "unit_rows.h"

namespace mcl::MCL_INSTRUCTION_SET {

constexpr int64_t FEW_AT_ONCE = MCL_PANEL_VECTORS == 4 ? 5 : 4;  // centres of few_centers.h

// The centres relative to `offset`, as rows and as columns of a product: an offset of the data costs no digits.
template <class T>
struct PackedCenters {
  int64_t stride, columns;  // columns: the centres in whole vectors
  T *offset, *zeros;        // [stride]
  T *rows, *panels;         // rows: zeros behind the last
  T* half_norms;            // |c|^2 / 2, 0 where cosine; infinity behind the last centre: it is never the nearest
  T* largest_norm;          // [1], the largest |c|
  double* inverse_norms;    // [columns], 1 / |c| where cosine

  PackedCenters(Arena& arena, int64_t width, int64_t centers)
      : stride(padded_width<T>(width)),
        columns(round_up(centers, LANES<T>)),
        offset(arena.take<T>(stride)),
        zeros(arena.take<T>(stride)),
        rows(arena.take<T>((columns + FEW_AT_ONCE) * stride)),
        panels(arena.take<T>(round_up(columns, PANEL<T>) * stride)),
        half_norms(arena.take<T>(columns)),
        largest_norm(arena.take<T>(1)),
        inverse_norms(arena.take<double>(columns)) {}
};

template <class T>
int64_t packed_centers_bytes(int64_t width, int64_t centers) {
  Arena arena(nullptr);
  PackedCenters<T>(arena, width, centers);
  return arena.bytes();
}

template <class T>
void pack_centers(const Clusters<T>& clusters, const T* centers, const T* offset, char* memory) {
  Arena arena(memory);
  const int64_t width = clusters.width, count = clusters.centers;
  PackedCenters<T> packed(arena, width, count);
  for (int64_t d = 0; d < packed.stride; d++) {
    packed.offset[d] = d < width ? offset[d] : T(0);
    packed.zeros[d] = 0;
  }
  double largest = 0;
  for (int64_t j = 0; j < packed.columns + FEW_AT_ONCE; j++) {
    T* row = packed.rows + j * packed.stride;
    double norm = 0;
    for (int64_t d = 0; d < packed.stride; d++) {
      row[d] = j < count && d < width ? centers[j * width + d] - offset[d] : T(0);
      norm += double(row[d]) * double(row[d]);
    }
    largest = norm <= largest ? largest : norm;
    if (j >= packed.columns) continue;
    packed.half_norms[j] = j >= count ? T(__builtin_inf()) : clusters.cosine ? T(0) : T(norm / 2);
    packed.inverse_norms[j] = norm > 0 ? 1 / __builtin_sqrt(norm) : 0;
  }
  *packed.largest_norm = T(__builtin_sqrt(largest));
  pack_panels(packed.rows, packed.columns, width, packed.stride, packed.panels);
}

// The type of the rows is that of the products, and they are neither divided by their norms.
template <class T>
bool rows_are_plain(const Clusters<T>& clusters) {
  return !clusters.cosine && clusters.rows.dtype == (sizeof(T) == 8 ? Dtype::float64 : Dtype::float32);
}

// Divides a row by its norm, of any size: only that of a zero row has no direction. Returns the square of its length.
template <class T>
T to_unit_length(T* x, int64_t width) {
  T squares = dot(x, x, width);
  if (!(squares > T(1e-30) && squares < T(1e30))) {  // it may have left the range of T
    T largest = 0;
    for (int64_t d = 0; d < width; d++) largest = larger(largest, T(__builtin_fabs(x[d])));
    for (int64_t d = 0; largest > 0 && d < width; d++) x[d] /= largest;
    squares = dot(x, x, width);
  }
  const T factor = squares == 0 ? T(0) : 1 / T(__builtin_sqrt(squares));
  for (int64_t d = 0; d < width; d++) x[d] *= factor;
  return factor * factor * squares;
}

// Relative to the offset, or of length 1; zeros behind. Returns |x|^2.
template <class T>
T load_cluster_row(const Clusters<T>& clusters, int64_t row, const PackedCenters<T>& centers, T* to) {
  const int64_t width = clusters.width;
  const T* from = to;
  if (rows_are_plain(clusters))
    from = reinterpret_cast<const T*>(address_of(clusters.rows, row));
  else
    copy_row(clusters.rows, row, width, to);
  for (int64_t d = width; d < centers.stride; d++) to[d] = 0;
  if (clusters.cosine) return to_unit_length(to, width);
  Vector<T> sums{};
  int64_t d = 0;
  for (; d + LANES<T> <= width; d += LANES<T>) {
    const Vector<T> x = load<Vector<T>>(from + d) - load<Vector<T>>(centers.offset + d);
    store(to + d, x);
    sums += x * x;
  }
  T squares = sum_lanes<T>(sums);
  for (; d < width; d++) {
    to[d] = from[d] - centers.offset[d];
    squares += to[d] * to[d];
  }
  return squares;
}

// Bounds the errors of scores s = |c|^2 / 2 - <x, c> of a row in each lane: |c| (|c| / 2 + |x|) times the error of a
// product. |c| is at most the largest norm of a centre, and at most |x| + |x - c|, where |x - c|^2 = |x|^2 + 2 s: one far
// centre takes no digits from the others.
template <class T>
struct ScoreErrors {
  Vector<T> of_largest, squares;
  T unit, least;

  Vector<T> operator()(Vector<T> score) const {
    const Vector<T> of_score = 4 * squares + 3 * score;
    return unit * (of_largest < of_score ? of_largest : of_score) + least;
  }
};

template <class T>
constexpr T ROUNDING = T(sizeof(T) == 8 ? 0x1p-53 : 0x1p-24);

// `squares` are |x|^2. A micro-kernel rounds at most DEPTH times, and a lane of the sums of few centres at most width /
// LANES times; rows and centres relative to the offset are rounded, too. Twice all that, since |x| and s are rounded; and
// what is lost below the normal numbers.
template <class T>
ScoreErrors<T> score_errors(const PackedCenters<T>& centers, int64_t width, Vector<T> squares) {
  T norms[LANES<T>];
  store(norms, squares);
  for (int64_t i = 0; i < LANES<T>; i++)
    norms[i] = T(sizeof(T) == 8 ? __builtin_sqrt(norms[i]) : __builtin_sqrtf(norms[i]));
  const T largest = *centers.largest_norm;
  const T unit = T(2 * (smaller(width, DEPTH) + width / LANES<T> + 8)) * ROUNDING<T>;
  const T least = T(width * (sizeof(T) == 8 ? 0x1p-1020 : 0x1p-124));
  return {largest * load<Vector<T>>(norms) + largest * largest / 2, squares, unit, least};
}

// A row as it lies in memory, from which distances are taken as differences in fp64.
template <class T>
struct ExactRow {
  const T* x;
  double inverse_norm;  // 1 where not cosine; 0 without a direction
};

// `memory` holds a row where that is a copy.
template <class T>
ExactRow<T> exact_row(const Clusters<T>& clusters, int64_t row, T* memory) {
  if (rows_are_plain(clusters)) return {reinterpret_cast<const T*>(address_of(clusters.rows, row)), 1};
  copy_row(clusters.rows, row, clusters.width, memory);
  if (!clusters.cosine) return {memory, 1};
  const auto squares = [&] { return wide_dot(memory, memory, clusters.width); };
  double norm = squares();
  if (!(norm > 1e-280 && norm < 1e280)) {
    to_unit_length(memory, clusters.width);
    norm = squares();
  }
  return {memory, norm == 0 ? 0 : 1 / __builtin_sqrt(norm)};
}

// The squared distance of a row to a centre, for cosine half that of their directions.
template <class T>
double exact_distance(const Clusters<T>& clusters, const PackedCenters<T>& centers, const ExactRow<T>& row,
                      int64_t center) {
  const double factor = clusters.cosine ? centers.inverse_norms[center] : 1;
  if (row.inverse_norm == 0 || factor == 0) return 1;  // there is no direction
  const int64_t width = clusters.width;
  const T *x = row.x, *c = clusters.points + center * width;
  constexpr int64_t WIDE = LANES<double>;
  Vector<double> sums{};
  int64_t d = 0;
  for (; d + WIDE <= width; d += WIDE) {
    const Vector<double> difference = load_wide(x + d) * row.inverse_norm - load_wide(c + d) * factor;
    sums += difference * difference;
  }
  double sum = sum_lanes<double>(sums);
  for (; d < width; d++) {
    const double difference = double(x[d]) * row.inverse_norm - double(c[d]) * factor;
    sum += difference * difference;
  }
  return clusters.cosine ? sum / 2 : sum;
}

// Rounding shows in a distance whose square is less than this part of the row's, both relative to the offset: in one
// that comes from a product, and in one that comes from differences of rows that are rounded themselves.
constexpr int NEAR_BY_PRODUCT = 16, NEAR_BY_DIFFERENCES = 4096;

// The squared distance of a loaded row to a centre, for cosine half that, by differences: rounded relative to itself, but
// for what row and centre were rounded by, relative to the offset.
template <class T>
T distance_by_differences(const Clusters<T>& clusters, const PackedCenters<T>& centers, const T* x, int64_t center) {
  const T* c = centers.rows + center * centers.stride;
  Vector<T> total{};
  for (int64_t d = 0; d < centers.stride; d += LANES<T>) {
    const Vector<T> difference = load<Vector<T>>(x + d) - load<Vector<T>>(c + d);
    total += difference * difference;
  }
  return clusters.cosine ? sum_lanes<T>(total) / 2 : sum_lanes<T>(total);
}

// The distance of a loaded row to the centre of its label; `memory` holds a row.
template <class T>
T distance_to_center(const Clusters<T>& clusters, const PackedCenters<T>& centers, int64_t row, const T* x, T squares,
                     int64_t label, T* memory) {
  const T distance = distance_by_differences(clusters, centers, x, label);
  const bool has_directions = !clusters.cosine || (squares != 0 && centers.inverse_norms[label] != 0);
  if (distance >= squares / NEAR_BY_DIFFERENCES && has_directions) return distance;
  return T(exact_distance(clusters, centers, exact_row(clusters, row, memory), label));
}

// The nearest so far of the centres that a row, whose label rounding could decide, is compared with in ascending order.
template <class T>
struct Nearest {
  ExactRow<T> exact;
  const T* x;      // the loaded row
  double squares;  // |x|^2
  double lowest = __builtin_inf();
  int64_t label = 0;

  // In fp64 where differences in T do not tell that it is farther.
  void compare(const Clusters<T>& clusters, const PackedCenters<T>& centers, int64_t center) {
    const double in_t = distance_by_differences(clusters, centers, x, center);
    const double roundings = (clusters.width / LANES<T> + 8) * double(ROUNDING<T>);
    const double moved = roundings * (__builtin_sqrt(squares) + double(*centers.largest_norm));  // row and centre
    const double error = 4 * roundings * in_t +
                         (2 * __builtin_sqrt(2 * in_t) + moved) * moved;
    if (in_t - error > lowest && (!clusters.cosine || centers.inverse_norms[center] != 0)) return;
    const double distance = exact_distance(clusters, centers, exact, center);
    if (distance < lowest) lowest = distance, label = center;
  }
};

// The two lowest scores of those seen, with another one.
template <class V>
inline void take_lowest(V s, V& lowest, V& second) {
  const V higher = s < lowest ? lowest : s;
  lowest = s < lowest ? s : lowest;
  second = higher < second ? higher : second;
}

// Rounded to a multiple of one number, such that all sums are exact: any order of rows has the same bits. It is the
// column's own, since columns may differ by powers of ten.
template <class T>
inline double rounded(T x, double rounding) {
  return (double(x) + rounding) - rounding;
}

// Adds a loaded row to the sum of its label, and takes it from the one that it was in before: few rows move. Where sums
// have several levels, [levels, K, D], each takes what rounding left of the one before.
template <class T>
void follow_row(const Clusters<T>& clusters, int64_t row, int64_t label, const T* __restrict x,
                double* __restrict sums, int64_t* counts) {
  const int64_t width = clusters.width, before = clusters.followed ? clusters.followed[row] : -1;
  if (label == before) return;
  const double* __restrict rounding = clusters.rounding;
  double* __restrict to = sums + label * width;
  double* __restrict from = sums + before * width;
  if (clusters.levels > 1) {
    const int64_t step = clusters.centers * width;
    for (int64_t d = 0; d < width; d++) {
      double left = x[d];
      for (int64_t level = 0; level < clusters.levels; level++) {
        const double entry = rounded(left, rounding[level * width + d]);
        to[level * step + d] += entry;
        if (before >= 0) from[level * step + d] -= entry;
        left -= entry;
      }
    }
  } else if (before < 0) {
    for (int64_t d = 0; d < width; d++) to[d] += rounded(x[d], rounding[d]);
  } else {
    for (int64_t d = 0; d < width; d++) {
      const double entry = rounded(x[d], rounding[d]);
      to[d] += entry;
      from[d] -= entry;
    }
  }
  if (before >= 0) counts[before]--;
  counts[label]++;
  if (clusters.followed) clusters.followed[row] = int32_t(label);
}

}  // namespace mcl::MCL_INSTRUCTION_SET
