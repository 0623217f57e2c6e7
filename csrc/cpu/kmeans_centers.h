// Packs centres for a pass of k-means, and computes the distance of a row to a centre.
#pragma once

#include "arena.h"
#include "kmeans_problem.h"
#include "packing.h"

namespace mcl::MCL_INSTRUCTION_SET {

constexpr int64_t FEW_AT_ONCE = MCL_PANEL_VECTORS == 4 ? 5 : 4;  // centres that kmeans_few.h multiplies at a time

// Columns of the packed centres in groups, of whole panels if there are enough of these, else of parts of them.
template <class T>
struct Groups {
  int64_t columns, groups, unit, units;

  Groups(int64_t columns, int64_t groups) : columns(columns), groups(larger<int64_t>(groups, 1)), unit(PANEL<T>) {
    while (unit > LANES<T> && columns < groups * unit) unit /= 2;
    units = (columns + unit - 1) / unit;
  }

  int64_t begin(int64_t group) const { return smaller((group * units + groups - 1) / groups * unit, columns); }
  int64_t of(int64_t column) const { return column / unit * groups / units; }
};

// For each group of centres the largest shift, the centre that has it, and the largest shift of the other centres.
struct GroupShifts {
  float largest[MAX_GROUPS], other[MAX_GROUPS];
  int64_t farthest[MAX_GROUPS];
};

// The centres relative to `offset`, as rows and as columns of a product. Without the offset of the data, products lose
// no digits to it.
template <class T>
struct PackedCenters {
  int64_t stride, columns;  // columns: number of centres, padded to full vectors
  T *offset, *zeros;        // [stride]
  T *rows, *panels;         // rows: zeros after the last centre
  T* half_norms;            // [columns], |c|^2 / 2, or 0 for cosine; infinite after the last centre: never the nearest
  T* largest_norm;          // [1], the largest |c|
  double *norms, *inverse_norms;  // [columns], |c|^2, 1 / |c|
  int32_t* center_of;       // [columns]: the centre of a column of `panels` and `half_norms`
  int32_t* group_of;        // [columns]: the group of a centre
  GroupShifts* shifts;      // [1]
  T* gathered;              // [LANES, stride]: rows of a vector of columns

  PackedCenters(Arena& arena, int64_t width, int64_t centers)
      : stride(padded_width<T>(width)),
        columns(round_up(centers, LANES<T>)),
        offset(arena.take<T>(stride)),
        zeros(arena.take<T>(stride)),
        rows(arena.take<T>((columns + FEW_AT_ONCE) * stride)),
        panels(arena.take<T>(round_up(columns, PANEL<T>) * stride)),
        half_norms(arena.take<T>(columns)),
        largest_norm(arena.take<T>(1)),
        norms(arena.take<double>(columns)),
        inverse_norms(arena.take<double>(columns)),
        center_of(arena.take<int32_t>(columns)),
        group_of(arena.take<int32_t>(columns)),
        shifts(arena.take<GroupShifts>(1)),
        gathered(arena.take<T>(LANES<T> * stride)) {}
};

template <class T>
int64_t packed_centers_bytes(int64_t width, int64_t centers) {
  Arena arena(nullptr);
  PackedCenters<T>(arena, width, centers);
  return arena.bytes();
}

// Finds the shifts of the groups, none without shifts of the centres.
template <class T>
void find_group_shifts(const Clusters<T>& clusters, const PackedCenters<T>& packed) {
  GroupShifts& shifts = *packed.shifts;
  for (int64_t g = 0; g < MAX_GROUPS; g++) shifts.largest[g] = shifts.other[g] = 0, shifts.farthest[g] = -1;
  for (int64_t j = 0; clusters.shifts && j < clusters.centers; j++) {
    const int64_t g = packed.group_of[j];
    const float shift = clusters.shifts[j];
    shifts.other[g] = larger(shifts.other[g], smaller(shift, shifts.largest[g]));
    if (shift > shifts.largest[g]) shifts.largest[g] = shift, shifts.farthest[g] = j;
  }
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
    packed.norms[j] = norm;
    packed.inverse_norms[j] = norm > 0 ? 1 / __builtin_sqrt(norm) : 0;
  }
  *packed.largest_norm = T(__builtin_sqrt(largest));
  const Groups<T> groups(packed.columns, clusters.groups);
  for (int64_t first = 0; first < packed.columns; first += LANES<T>) {
    for (int64_t j = first; j < first + LANES<T>; j++) {
      const int64_t center = clusters.order && j < count ? clusters.order[j] : j;
      packed.center_of[j] = int32_t(center);
      packed.group_of[center] = int32_t(groups.of(j));
      const T half_norm = clusters.cosine ? T(0) : T(packed.norms[center] / 2);
      packed.half_norms[j] = center < count ? half_norm : T(__builtin_inf());
      __builtin_memcpy(packed.gathered + (j - first) * packed.stride, packed.rows + center * packed.stride,
                       packed.stride * sizeof(T));
    }
    pack_panels(packed.gathered, LANES<T>, width, packed.stride,
                packed.panels + first / PANEL<T> * PANEL<T> * packed.stride + first % PANEL<T>);
  }
  find_group_shifts(clusters, packed);
}

// Returns whether rows are multiplied as they are stored: in the type of the products, and not divided by their norms.
template <class T>
bool rows_are_plain(const Clusters<T>& clusters) {
  return !clusters.cosine && clusters.rows.dtype == (sizeof(T) == 8 ? Dtype::float64 : Dtype::float32);
}

// Divides a row by its norm, which may be outside the range of T; a row of zeros stays. Returns the squared norm of the
// result.
template <class T>
T to_unit_length(T* x, int64_t width) {
  T squares = dot(x, x, width);
  if (!(squares > T(1e-30) && squares < T(1e30))) {  // near the limits of fp32: scale the row first
    T largest = 0;
    for (int64_t d = 0; d < width; d++) largest = larger(largest, T(__builtin_fabs(x[d])));
    for (int64_t d = 0; largest > 0 && d < width; d++) x[d] /= largest;
    squares = dot(x, x, width);
  }
  const T factor = squares == 0 ? T(0) : 1 / T(__builtin_sqrt(squares));
  for (int64_t d = 0; d < width; d++) x[d] *= factor;
  return factor * factor * squares;
}

// Loads a row relative to the offset, or for cosine divided by its norm, with zeros after D. Returns |x|^2.
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

// Bounds the errors of scores s = |c|^2 / 2 - <x, c>, a row in each lane: |c| (|c| / 2 + |x|) times the relative error
// of a product. |c| is at most the largest norm of a centre, and at most |x| + |x - c|, where |x - c|^2 = |x|^2 + 2 s.
// The second bound keeps one far centre from widening the bounds of the others.
template <class T>
struct ScoreErrors {
  Vector<T> largest_bound, squares;
  T relative, minimum;

  Vector<T> operator()(Vector<T> score) const {
    const Vector<T> score_bound = 4 * squares + 3 * score;
    return relative * (largest_bound < score_bound ? largest_bound : score_bound) + minimum;
  }
};

template <class T>
constexpr T ROUNDING = T(sizeof(T) == 8 ? 0x1p-53 : 0x1p-24);

// `squares` are |x|^2. A micro-kernel rounds at most DEPTH times, and a lane of the sums of few centres at most width /
// LANES times; rows and centres relative to the offset are rounded, too. The bound is doubled, since |x| and s are
// themselves rounded. `minimum` bounds the errors of underflow.
template <class T>
ScoreErrors<T> score_errors(const PackedCenters<T>& centers, int64_t width, Vector<T> squares) {
  T norms[LANES<T>];
  store(norms, squares);
  for (int64_t i = 0; i < LANES<T>; i++)
    norms[i] = T(sizeof(T) == 8 ? __builtin_sqrt(norms[i]) : __builtin_sqrtf(norms[i]));
  const T largest = *centers.largest_norm;
  const T relative = T(2 * (smaller(width, DEPTH) + width / LANES<T> + 8)) * ROUNDING<T>;
  const T minimum = T(width * (sizeof(T) == 8 ? 0x1p-1020 : 0x1p-124));
  return {largest * load<Vector<T>>(norms) + largest * largest / 2, squares, relative, minimum};
}

// The same of one row.
template <class T>
struct RowErrors {
  T largest_bound, squares, relative, minimum;

  T operator()(T score) const {
    return relative * smaller(largest_bound, 4 * squares + 3 * score) + minimum;
  }
};

template <class T>
RowErrors<T> score_errors(const PackedCenters<T>& centers, int64_t width, T squares) {
  const ScoreErrors<T> errors = score_errors(centers, width, broadcast(squares));
  return {errors.largest_bound[0], squares, errors.relative, errors.minimum};
}

// A row as stored, for distances computed from differences in fp64.
template <class T>
struct ExactRow {
  const T* x;
  double inverse_norm;  // 1 unless cosine; 0 for a row of zeros
};

// `memory`, [D], is written if the row has to be copied.
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

// The squared distance of a row to a centre; for cosine half the squared distance of their directions.
template <class T>
double exact_distance(const Clusters<T>& clusters, const PackedCenters<T>& centers, const ExactRow<T>& row,
                      int64_t center) {
  const double factor = clusters.cosine ? centers.inverse_norms[center] : 1;
  if (row.inverse_norm == 0 || factor == 0) return 1;  // one of them has no direction
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

// A squared distance below |x|^2 divided by this, both relative to the offset, has lost digits to rounding: if computed
// from a product, and if computed from differences of rounded rows.
constexpr int NEAR_BY_PRODUCT = 16, NEAR_BY_DIFFERENCES = 4096;

// The squared distance of a loaded row to a centre, for cosine half of it, by differences. Its rounding error is
// relative to the distance itself, plus the rounding of row and centre relative to the offset.
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

// The distance of a loaded row to the centre of its label; `memory` is as for `exact_row`.
template <class T>
T distance_to_center(const Clusters<T>& clusters, const PackedCenters<T>& centers, int64_t row, const T* x, T squares,
                     int64_t label, T* memory) {
  const T distance = distance_by_differences(clusters, centers, x, label);
  const bool has_directions = !clusters.cosine || (squares != 0 && centers.inverse_norms[label] != 0);
  if (distance >= squares / NEAR_BY_DIFFERENCES && has_directions) return distance;
  return T(exact_distance(clusters, centers, exact_row(clusters, row, memory), label));
}

// Finds the nearest centre of a row whose label depends on rounding; the first of equally near ones.
template <class T>
struct Nearest {
  ExactRow<T> exact;
  const T* x;      // the loaded row
  double squares;  // |x|^2
  double lowest = __builtin_inf();
  int64_t label = 0;

  // Compares in fp64 unless differences in T prove that the centre is farther.
  void compare(const Clusters<T>& clusters, const PackedCenters<T>& centers, int64_t center) {
    const double in_t = distance_by_differences(clusters, centers, x, center);
    const double roundings = (clusters.width / LANES<T> + 8) * double(ROUNDING<T>);
    const double operand_error = roundings * (__builtin_sqrt(squares) + double(*centers.largest_norm));
    const double error = 4 * roundings * in_t + (2 * __builtin_sqrt(2 * in_t) + operand_error) * operand_error;
    if (in_t - error > lowest && (!clusters.cosine || centers.inverse_norms[center] != 0)) return;
    const double distance = exact_distance(clusters, centers, exact, center);
    if (distance < lowest || (distance == lowest && center < label)) lowest = distance, label = center;
  }
};

// Updates the two lowest scores with another score.
template <class V>
inline void take_lowest(V s, V& lowest, V& second) {
  const V higher = s < lowest ? lowest : s;
  lowest = s < lowest ? s : lowest;
  second = higher < second ? higher : second;
}

// x rounded to a multiple of a power of two, so that sums are exact and any order of rows gives the same bits. Each
// column has its own `rounding`, since columns may differ by powers of ten.
template <class T>
inline double rounded(T x, double rounding) {
  return (double(x) + rounding) - rounding;
}

// Adds a loaded row to the sum of its label, and subtracts it from the sum of its previous label. A row that keeps its
// label is skipped, and one of weight 0 is in no sum. With several levels, [levels, K, columns], each level sums what
// rounding left over from the one before.
template <class T>
void follow_row(const Clusters<T>& clusters, int64_t row, int64_t label, const T* __restrict x,
                double* __restrict sums, int64_t* counts) {
  const int64_t width = clusters.width, before = clusters.followed ? clusters.followed[row] : -1;
  if (label == before) return;
  if (clusters.followed) clusters.followed[row] = int32_t(label);
  const double weight = clusters.weights ? clusters.weights[row] : 1;
  if (weight == 0) return;
  const int64_t columns = width + (clusters.weights != nullptr);
  const double* __restrict rounding = clusters.rounding;
  double* __restrict to = sums + label * columns;
  double* __restrict from = sums + before * columns;
  if (clusters.weights || clusters.levels > 1) {
    const auto follow_entries = [&]<class V>(int64_t d, V left) {
      for (int64_t level = 0; level < clusters.levels; level++) {
        const V level_rounding = load<V>(rounding + level * columns + d);
        const V entry = (left + level_rounding) - level_rounding;
        const int64_t at = level * clusters.centers * columns + d;
        store(to + at, load<V>(to + at) + entry);
        if (before >= 0) store(from + at, load<V>(from + at) - entry);
        left -= entry;
      }
    };
    int64_t d = 0;
    for (; d + LANES<double> <= width; d += LANES<double>) follow_entries(d, weight * load_wide(x + d));
    for (; d < width; d++) follow_entries(d, weight * double(x[d]));
    if (clusters.weights) follow_entries(width, weight);
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
}

}  // namespace mcl::MCL_INSTRUCTION_SET
