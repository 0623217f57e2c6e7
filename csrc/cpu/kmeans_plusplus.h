// A step of greedy k-means++: finds the rows that are nearer to a candidate than to the centres so far.
//
// Distances are sums of squared differences: those of equal rows are 0, and none loses digits to an offset of the data.
// Two bounds avoid reading a row; results have the same bits without them. A row x with nearest centre c is no nearer
// to a candidate q if |q - c| >= 2 |x - c|. Other rows are first compared by their codes, one byte an element. The row
// relative to the offset is scale * code + e, so that
//     |x - q|^2 >= |x|^2 + |q|^2 - 2 (scale <code, q> + |e| |q|)
#pragma once

#include "kmeans_few.h"

namespace mcl::MCL_INSTRUCTION_SET {

constexpr int64_t CANDIDATES_AT_ONCE = 4;                                      // that are subtracted from a row
constexpr int64_t CODES_AT_ONCE = 2, CODED_CANDIDATES = MCL_VECTOR_BYTES / 8;  // whose sums are held in registers
constexpr int64_t CODE_CHUNK = MCL_VECTOR_BYTES;                               // elements coded in a vector of words
constexpr int64_t CODES_AHEAD = 8;                                             // are prefetched
constexpr int CODE_LIMIT = 127;

// Bound of the relative error of a sum of `width` products or squares, in lanes.
template <class T>
inline double sum_rounding(int64_t width) {
  return (width / LANES<T> + LANES<T> + 8) * double(ROUNDING<T>);
}

// The squared distance of two rows in fp64.
template <class T>
double wide_squared_distance(const T* x, const T* y, int64_t width) {
  double sum = 0;
  for (int64_t d = 0; d < width; d++) {
    const double difference = double(x[d]) - double(y[d]);
    sum += difference * difference;
  }
  return sum;
}

// Finds the squared distances of a row to the candidates listed in `index`, at most CANDIDATES_AT_ONCE.
template <class T>
inline void seeding_distances(const Seeding<T>& seeding, const T* x, const int64_t* index, int64_t count,
                              double* distances) {
  using V = Vector<T>;
  const int64_t width = seeding.width;
  const T* candidates[CANDIDATES_AT_ONCE];
  for (int64_t j = 0; j < CANDIDATES_AT_ONCE; j++)
    candidates[j] = seeding.stored + index[smaller(j, count - 1)] * seeding.stride;
  V sums[CANDIDATES_AT_ONCE] = {};
  const auto add = [&](int64_t d, V elements) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < CANDIDATES_AT_ONCE; j++) {
      const V difference = elements - load<V>(candidates[j] + d);
      sums[j] += difference * difference;
    }
  };
  int64_t d = 0;
  for (; d + LANES<T> <= width; d += LANES<T>) add(d, load<V>(x + d));
  if (d < width) {
    V rest{};
    __builtin_memcpy(&rest, x + d, (width - d) * sizeof(T));
    add(d, rest);
  }
  for (int64_t j = 0; j < count; j++) {
    const T squared = sum_lanes<T>(sums[j]);
    // The square of a small difference may be below the range of T, where it would be 0.
    const bool tiny = sizeof(T) < 8 && squared < width * T(1e-30);
    distances[j] = tiny ? wide_squared_distance(x, candidates[j], width) : double(squared);
  }
}

// A chunk of a row relative to the offset, in fp64, with zeros after D.
template <class T>
struct RelativeChunk {
  double elements[CODE_CHUNK];

  RelativeChunk(const T* x, const T* offset, int64_t width, int64_t begin) {
    const int64_t count = smaller(width - begin, CODE_CHUNK);
    for (int64_t d = 0; d < count; d++) elements[d] = double(x[begin + d]) - double(offset[begin + d]);
    for (int64_t d = larger<int64_t>(count, 0); d < CODE_CHUNK; d++) elements[d] = 0;
  }
};

// Writes a row relative to the offset as scale * code. Words of the width of T hold the codes plus CODE_LIMIT + 1 as
// bytes: byte j of the words of a chunk are its elements j * LANES .. (j + 1) * LANES - 1.
template <class T>
void code_row(const T* x, const T* offset, int64_t width, Index<T>* words, RowCode<T>& constants) {
  using Wide = Vector<double>;
  constexpr double TO_INTEGER = 0x1.8p52;  // added and subtracted, rounds to the nearest integer
  Wide largest{}, squares{}, errors{};
  for (int64_t begin = 0; begin < width; begin += CODE_CHUNK) {
    const RelativeChunk<T> chunk(x, offset, width, begin);
    for (int64_t d = 0; d < CODE_CHUNK; d += LANES<double>) {
      const Wide element = load<Wide>(chunk.elements + d), size = element < 0 ? -element : element;
      largest = largest < size ? size : largest;
      squares += element * element;
    }
  }
  const T scale = T(largest_lane<double>(largest) / CODE_LIMIT);
  const double inverse = double(scale) > 1e-300 ? 1 / double(scale) : 0;
  for (int64_t begin = 0; begin < width; begin += CODE_CHUNK, words += LANES<T>) {
    const RelativeChunk<T> chunk(x, offset, width, begin);
    double rounded[CODE_CHUNK];
    for (int64_t d = 0; d < CODE_CHUNK; d += LANES<double>) {
      const Wide element = load<Wide>(chunk.elements + d);
      Wide code = (element * inverse + TO_INTEGER) - TO_INTEGER;
      code = code > double(CODE_LIMIT) ? broadcast<double>(CODE_LIMIT) : code;  // where the scale is subnormal
      code = code < -double(CODE_LIMIT) ? broadcast<double>(-CODE_LIMIT) : code;
      const Wide error = element - code * double(scale);
      errors += error * error;
      store(rounded + d, code + double(CODE_LIMIT + 1));
    }
    for (int64_t lane = 0; lane < LANES<T>; lane++) {
      uint64_t word = 0;
      for (int64_t j = 0; j < int64_t(sizeof(T)); j++) word |= uint64_t(rounded[j * LANES<T> + lane]) << 8 * j;
      words[lane] = Index<T>(word);
    }
  }
  // Besides e, the rounding of the candidate relative to the offset and of the product.
  const double total = sum_lanes<double>(squares);
  const double error = __builtin_sqrt(sum_lanes<double>(errors)) + 2 * sum_rounding<T>(width) * __builtin_sqrt(total);
  constexpr double SMALLEST = sizeof(T) == 8 ? 0x1p-1000 : 0x1p-120;  // above the range where T loses digits
  constants = {T(total * (1 - 0x1p-20)), scale, T(error * (1 + 0x1p-20) + SMALLEST)};
}

template <class T>
void code_rows(const SampledRows<T>& rows, const T* offset, int64_t width, int64_t code_stride, int64_t begin,
               int64_t end, int8_t* codes, RowCode<T>* constants) {
  for (int64_t i = begin; i < end; i++)
    code_row(rows.at(i), offset, width, reinterpret_cast<Index<T>*>(codes + i * code_stride), constants[i]);
}

// The codes in byte `byte` of words, as T: or-ed into the last bits of a power of two whose last bit has value 1.
template <class T>
inline Vector<T> byte_of_words(Mask<T> words, int64_t byte) {
  constexpr Index<T> POWER_BITS = sizeof(T) == 8 ? Index<T>(0x4330000000000000) : Index<T>(0x4b000000);
  constexpr T POWER = sizeof(T) == 8 ? T(0x1p52) : T(0x1p23);
  const Mask<T> bits = ((words >> Index<T>(8 * byte)) & Index<T>(0xff)) | POWER_BITS;
  return (Vector<T>)bits - (POWER + (CODE_LIMIT + 1));
}

// Multiplies CODES_AT_ONCE codes by CODED_CANDIDATES candidates: products [CODES_AT_ONCE, CODED_CANDIDATES]. Prefetches
// other codes.
template <class T>
inline void multiply_codes(const int8_t* const* codes, const int8_t* const* next, const T* candidates, int64_t stride,
                           int64_t width, T* products) {
  using V = Vector<T>;
  V sums[CODES_AT_ONCE][CODED_CANDIDATES] = {};
  for (int64_t d = 0; d < width; d += CODE_CHUNK) {
    Mask<T> words[CODES_AT_ONCE];
#pragma GCC unroll 2
    for (int64_t i = 0; i < CODES_AT_ONCE; i++) {
      words[i] = load<Mask<T>>(codes[i] + d);
      __builtin_prefetch(next[i] + d);
    }
#pragma GCC unroll 8
    for (int64_t byte = 0; byte < int64_t(sizeof(T)); byte++) {
      V elements[CODES_AT_ONCE];
#pragma GCC unroll 2
      for (int64_t i = 0; i < CODES_AT_ONCE; i++) elements[i] = byte_of_words<T>(words[i], byte);
#pragma GCC unroll 8
      for (int64_t j = 0; j < CODED_CANDIDATES; j++) {
        const V candidate = load<V>(candidates + j * stride + d + byte * LANES<T>);
#pragma GCC unroll 2
        for (int64_t i = 0; i < CODES_AT_ONCE; i++) sums[i][j] += elements[i] * candidate;
      }
    }
  }
  constexpr int64_t COUNT = CODES_AT_ONCE * CODED_CANDIDATES;
  T lanes[COUNT * LANES<T>];
#pragma GCC unroll 2
  for (int64_t i = 0; i < CODES_AT_ONCE; i++)
#pragma GCC unroll 8
    for (int64_t j = 0; j < CODED_CANDIDATES; j++) store(lanes + (i * CODED_CANDIDATES + j) * LANES<T>, sums[i][j]);
  for (int64_t i = 0; i < COUNT; i += LANES<T>) store(products + i, sum_vectors<T>(lanes + i * LANES<T>));
}

template <class T>
int64_t seeding_stride(int64_t width) {
  return padded_width<T>(round_up(width, CODE_CHUNK));
}

// Copies the candidates, and computes the limits of each centre.
template <class T>
void begin_seeding_step(const Seeding<T>& seeding, const int64_t* candidate_rows, const int64_t* center_rows) {
  const int64_t width = seeding.width, count = seeding.candidates, stride = seeding.stride;
  for (int64_t j = 0; j < round_up(count, 8); j++) {
    T *to = seeding.stored + j * stride, *relative = seeding.relative + j * stride;
    const T* from = seeding.rows.at(candidate_rows[smaller(j, count - 1)]);
    double squares = 0;
    for (int64_t d = 0; d < stride; d++) {
      to[d] = d < width ? from[d] : T(0);
      const double element = d < width ? double(from[d]) - double(seeding.offset[d]) : 0;
      relative[d] = T(element);
      squares += element * element;
    }
    seeding.squares[j] = squares;
    seeding.norms[j] = __builtin_sqrt(squares);
  }
  const double margin = 1 + 16 * sum_rounding<T>(width);  // of two computed distances
  for (int64_t c = 0; c < seeding.centers; c++) {
    const T* center = seeding.rows.at(center_rows[c]);
    double *limits = seeding.limits + c * count, lowest = __builtin_inf();
    for (int64_t j = 0; j < count; j += CANDIDATES_AT_ONCE) {
      const int64_t index[CANDIDATES_AT_ONCE] = {j, j + 1, j + 2, j + 3};
      seeding_distances(seeding, center, index, smaller(count - j, CANDIDATES_AT_ONCE), limits + j);
    }
    for (int64_t j = 0; j < count; j++) {
      limits[j] = limits[j] < __builtin_inf() ? limits[j] / (4 * margin) : 0;  // no bound from an overflow
      lowest = smaller(lowest, limits[j]);
    }
    seeding.lowest[c] = lowest;
  }
}

// Rows of a block that are left to compare, and the candidates of each as bits.
struct SeedingRows {
  int64_t count = 0, rows[SEEDING_ROWS];
  uint64_t candidates[SEEDING_ROWS];

  void add(int64_t row, uint64_t row_candidates) {
    rows[count] = row;
    candidates[count] = row_candidates;
    count += row_candidates != 0;
  }
};

// Returns the rows, without the candidates that their codes prove to be no nearer than the nearest centre.
template <class T>
SeedingRows compare_codes(const Seeding<T>& seeding, const SeedingRows& all) {
  const double margin = 1 + 16 * sum_rounding<T>(seeding.width), rounding = 1 - 0x1p-20;
  SeedingRows left;
  for (int64_t r = 0; r < all.count; r += CODES_AT_ONCE) {
    const int64_t rows = smaller(CODES_AT_ONCE, all.count - r);
    const int8_t *codes[CODES_AT_ONCE], *next[CODES_AT_ONCE];
    uint64_t candidates[CODES_AT_ONCE], any = 0;
    for (int64_t i = 0; i < CODES_AT_ONCE; i++) {
      codes[i] = seeding.codes + all.rows[r + smaller(i, rows - 1)] * seeding.code_stride;
      next[i] = seeding.codes + all.rows[smaller(r + i + CODES_AHEAD, all.count - 1)] * seeding.code_stride;
      candidates[i] = i < rows ? all.candidates[r + i] : 0;
      any |= candidates[i];
    }
    for (int64_t j = 0; j < seeding.candidates; j += CODED_CANDIDATES) {
      if (!(any >> j & ((1 << CODED_CANDIDATES) - 1))) continue;
      T products[CODES_AT_ONCE * CODED_CANDIDATES];
      multiply_codes(codes, next, seeding.relative + j * seeding.stride, seeding.stride,
                     round_up(seeding.width, CODE_CHUNK), products);
      for (int64_t i = 0; i < rows; i++) {
        const int64_t row = all.rows[r + i];
        const RowCode<T> code = seeding.row_codes[row];
        const double nearest = seeding.nearest[row] * margin;
        for (int64_t l = j; l < j + CODED_CANDIDATES; l++) {
          const double product = double(code.scale) * products[i * CODED_CANDIDATES + l - j];
          const double lower = code.squares + seeding.squares[l] * rounding -
                               2 * (product + double(code.error) * seeding.norms[l]);
          if (lower >= nearest) candidates[i] &= ~(uint64_t(1) << l);
        }
      }
    }
    for (int64_t i = 0; i < rows; i++) left.add(all.rows[r + i], candidates[i]);
  }
  return left;
}

// Compares rows begin .. end - 1, at most SEEDING_ROWS, with the candidates. Writes the rows that are nearer to one of
// them than to the centres, and their distances, infinite where a candidate is not nearer. Adds to `gains` how much
// each candidate would lower the sum of the nearest distances.
template <class T>
SeedingCounts compare_with_candidates(const Seeding<T>& seeding, int64_t begin, int64_t end, int64_t* nearer,
                                      double* distances, double* gains) {
  const int64_t candidates = seeding.candidates;
  SeedingRows left;
  for (int64_t i = begin; i < end; i++) {
    const double nearest = seeding.nearest[i];
    if (!(nearest > seeding.lowest[seeding.labels[i]])) continue;
    const double* limits = seeding.limits + seeding.labels[i] * candidates;
    uint64_t row_candidates = 0;
    for (int64_t j = 0; j < candidates; j++) row_candidates |= uint64_t(nearest > limits[j]) << j;
    left.add(i, row_candidates);
  }
  SeedingCounts counts{left.count, 0};
  if (seeding.codes) left = compare_codes(seeding, left);
  for (int64_t r = 0; r < left.count; r++) {
    const char* next = reinterpret_cast<const char*>(seeding.rows.at(left.rows[smaller(r + 2, left.count - 1)]));
    for (int64_t byte = 0; byte < seeding.width * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(next + byte);
    const double nearest = seeding.nearest[left.rows[r]];
    const double weight = seeding.weights ? seeding.weights[left.rows[r]] : 1;
    double* to = distances + counts.nearer * candidates;
    for (int64_t j = 0; j < candidates; j++) to[j] = __builtin_inf();
    bool any = false;
    for (uint64_t bits = left.candidates[r]; bits;) {
      int64_t index[CANDIDATES_AT_ONCE], group = 0;
      for (; bits && group < CANDIDATES_AT_ONCE; bits &= bits - 1) index[group++] = __builtin_ctzll(bits);
      double found[CANDIDATES_AT_ONCE];
      seeding_distances(seeding, seeding.rows.at(left.rows[r]), index, group, found);
      for (int64_t i = 0; i < group; i++) {
        if (!(found[i] < nearest)) continue;
        to[index[i]] = found[i];
        gains[index[i]] += (nearest - found[i]) * weight;
        any = true;
      }
    }
    nearer[counts.nearer] = left.rows[r];
    counts.nearer += any;
  }
  return counts;
}

}  // namespace mcl::MCL_INSTRUCTION_SET
