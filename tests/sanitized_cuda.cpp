// Checks the CUDA kernels without torch or a GPU: each thread of a block is a system thread, and results are compared
// with sums in double precision. `make sanitize` builds and runs it under ThreadSanitizer, which detects accesses that
// no barrier orders. With an argument, FILE:LINE, the barrier there is left out; tests/test_cuda.py does so with every
// one.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "launch.h"
#include "scalars.cuh"

namespace {

struct Case {
  const char* name;
  mcl::Dtype dtype;
  int rows, columns;  // no columns: the self form
  int64_t width;
  int labels, ids;    // number of different ones
  bool different;     // negatives="different", else "same"
  int programs = 0;   // that share the work
};

// Queries or keys.
struct Side {
  int size;
  std::vector<double> values;  // rounded to the dtype
  std::vector<char> bytes;     // the same in the dtype
  std::vector<int64_t> labels, ids;
  std::vector<int64_t> order;  // by (label, id)
};

template <class T>
void append(std::vector<char>& bytes, T x) {
  const char* at = reinterpret_cast<const char*>(&x);
  bytes.insert(bytes.end(), at, at + sizeof x);
}

Side make_side(int size, const Case& c, int seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0, 1 / std::sqrt(double(c.width)));
  Side side{size, {}, {}, {}, {}, {}};
  for (int64_t i = 0; i < size * c.width; i++) {
    const float x = float(normal(random));
    if (c.dtype == mcl::Dtype::float32) {
      side.values.push_back(x);
      append(side.bytes, x);
    } else if (c.dtype == mcl::Dtype::float64) {
      side.values.push_back(x);
      append(side.bytes, double(x));
    } else if (c.dtype == mcl::Dtype::float16) {
      side.values.push_back(mcl::wide(mcl::rounded<__half>(x)));
      append(side.bytes, mcl::rounded<__half>(x));
    } else {
      side.values.push_back(mcl::wide(mcl::rounded<__nv_bfloat16>(x)));
      append(side.bytes, mcl::rounded<__nv_bfloat16>(x));
    }
  }
  for (int i = 0; i < size; i++) {
    side.labels.push_back(int64_t(random() % (c.labels + 1)) - 1);  // -1 matches nothing
    side.ids.push_back(c.columns ? random() % c.ids : i);
  }
  side.order.resize(size);
  std::iota(side.order.begin(), side.order.end(), 0);
  std::stable_sort(side.order.begin(), side.order.end(), [&](int64_t i, int64_t j) {
    return std::pair(side.labels[i], side.ids[i]) < std::pair(side.labels[j], side.ids[j]);
  });
  return side;
}

bool kept(const Case& c, const Side& x, int i, const Side& y, int j) {
  if (x.labels[i] < 0 || y.labels[j] < 0 || x.ids[i] == y.ids[j]) return false;
  return (x.labels[i] == y.labels[j]) != c.different;
}

double largest_error(const char* what, const std::vector<double>& got, const std::vector<double>& wanted) {
  double largest = 1e-30, error = 0;
  for (size_t i = 0; i < wanted.size(); i++) {
    if (!std::isfinite(wanted[i])) {
      if (got[i] != wanted[i]) error = INFINITY;
      continue;
    }
    largest = std::max(largest, std::abs(wanted[i]));
    error = std::isfinite(got[i]) ? std::max(error, std::abs(got[i] - wanted[i])) : INFINITY;
  }
  if (error / largest > 1e-2) std::printf("  %s: error %g of %g\n", what, error, largest);
  return error / largest;
}

// The range of sorted columns of each sorted row.
struct Ranges {
  std::vector<int64_t> begin, end;
};

Ranges find_ranges(const Case& c, const Side& x, const Side& y) {
  Ranges ranges;
  const auto first = [&](auto found) {
    return std::find_if(y.order.begin(), y.order.end(), found) - y.order.begin();
  };
  for (const int64_t i : x.order) {
    const int64_t label = x.labels[i], first_label = c.different ? std::min<int64_t>(label, 0) : label;
    const int64_t begin = first([&](int64_t j) { return y.labels[j] >= first_label; });
    ranges.begin.push_back(begin);
    if (label < 0)
      ranges.end.push_back(begin);
    else
      ranges.end.push_back(c.different ? y.size : first([&](int64_t j) { return y.labels[j] > label; }));
  }
  return ranges;
}

bool check_plan(const Case& c, bool sorts_tiles_once) {
  const Side x = make_side(c.rows, c, 1), keys = make_side(c.columns, c, 2), &y = c.columns ? keys : x;
  std::vector<int64_t> order(x.size), begin(x.size), end(x.size), key_order(keys.size);
  std::vector<int64_t> sorted_tiles(3 * (x.size + keys.size));
  mcl::make_plan({{x.labels.data(), x.ids.data(), x.size, order.data(), begin.data(), end.data()},
                  {y.labels.data(), y.ids.data(), keys.size, key_order.data(), nullptr, nullptr},
                  c.columns == 0, c.different ? mcl::Negatives::different : mcl::Negatives::same,
                  sorts_tiles_once ? sorted_tiles.data() : nullptr},
                 nullptr);
  const Ranges ranges = find_ranges(c, x, y);
  const bool good = order == x.order && key_order == keys.order && begin == ranges.begin && end == ranges.end;
  std::printf("%-32s %s\n", c.name, good ? "good" : "WRONG");
  return good;
}

template <class T>
bool check(const Case& c) {
  const Side x = make_side(c.rows, c, 1), keys = make_side(c.columns, c, 2), &y = c.columns ? keys : x;
  const int n = x.size, m = y.size;
  const bool half = c.dtype == mcl::Dtype::float16 || c.dtype == mcl::Dtype::bfloat16;
  const T scale = 5;

  const auto [begin, end] = find_ranges(c, x, y);
  std::vector<int32_t> drop_begin(n), drop_end(n);
  const auto &values = c.different ? x.labels : x.ids, &column_values = c.different ? y.labels : y.ids;
  mcl::find_dropped({x.order.data(), begin.data(), end.data(), values.data(), y.order.data(), column_values.data(), n,
                     drop_begin.data(), drop_end.data()},
                    nullptr);

  const auto matrix = [&](const Side& side) {
    return mcl::Matrix{side.bytes.data(), c.width, 1, c.dtype, c.width * int64_t(sizeof(T)) % 16 == 0 && !half};
  };
  const mcl::Pairs<T> pairs{{matrix(x), x.order.data(), n, begin.data(), end.data(), drop_begin.data(),
                             drop_end.data(), c.different ? x.ids.data() : nullptr},
                            {matrix(y), y.order.data(), m, c.different ? y.ids.data() : nullptr},
                            c.width, half, c.different, &scale, 0};
  std::vector<T> lse(n), weight(n), column_lse(m), column_weight(m), threshold(n, T(0.01)), grad_scale(n);
  std::vector<int64_t> count(n);
  for (int i = 0; i < n; i++) weight[i] = T(i % 5) - 1;
  for (int j = 0; j < m; j++) column_weight[j] = T(j % 3) - 1, column_lse[j] = T(0.1) * T(j % 7);
  std::deque<std::vector<char>> workspaces;
  const auto allocate = [&](int64_t bytes) {
    return static_cast<void*>(workspaces.emplace_back(bytes, char(0xff)).data());  // all NaN
  };
  mcl::masked_lse_forward(mcl::ForwardProblem<T>{pairs, lse.data(), nullptr, nullptr}, c.programs, allocate, nullptr);
  mcl::masked_lse_forward(mcl::ForwardProblem<T>{pairs, nullptr, threshold.data(), count.data()}, c.programs, allocate,
                          nullptr);
  std::vector<char> grad_bytes(x.bytes.size());
  const T fp16_scale = c.dtype == mcl::Dtype::float16 ? 64 : 1;
  mcl::masked_lse_backward(
      mcl::BackwardProblem<T>{pairs, lse.data(), weight.data(), column_lse.data(), column_weight.data(), nullptr,
                              &fp16_scale, grad_bytes.data(), grad_scale.data()},
      c.programs, allocate, nullptr);

  std::vector<double> exact_lse(n), exact_grad(n * c.width), exact_scale(n);
  bool counted = true;
  for (int i = 0; i < n; i++) {
    std::vector<double> products(m);
    double sum = 0;
    int64_t above = 0;
    for (int j = 0; j < m; j++) {
      for (int64_t d = 0; d < c.width; d++) products[j] += x.values[i * c.width + d] * y.values[j * c.width + d];
      if (!kept(c, x, i, y, j)) continue;
      sum += std::exp(scale * products[j]);
      above += products[j] > 0.01;
    }
    exact_lse[i] = std::log(sum);
    counted &= above == count[i];
    for (int j = 0; j < m; j++) {
      if (!kept(c, x, i, y, j)) continue;
      const double w = weight[i] * std::exp(scale * products[j] - exact_lse[i]) +
                       column_weight[j] * std::exp(scale * products[j] - column_lse[j]);
      exact_scale[i] += w * products[j];
      for (int64_t d = 0; d < c.width; d++) exact_grad[i * c.width + d] += scale * w * y.values[j * c.width + d];
    }
  }
  std::vector<double> grad;
  const mcl::Matrix gradient{grad_bytes.data(), c.width, 1, c.dtype, false};
  for (int64_t at = 0; at < n * c.width; at++) grad.push_back(double(mcl::read<T>(gradient, at)));
  const auto doubles = [](const std::vector<T>& v) { return std::vector<double>(v.begin(), v.end()); };
  const double tolerance = half ? 1e-2 : 1e-5;  // weights of half precision are rounded to it
  const bool good = counted & (largest_error("LSE", doubles(lse), exact_lse) < 1e-5) &
                    (largest_error("gradient", grad, exact_grad) < tolerance) &
                    (largest_error("gradient of the scale", doubles(grad_scale), exact_scale) < 1e-4);
  std::printf("%-32s %s\n", c.name, good ? "good" : "WRONG");
  return good;
}

// Rows and columns of two tiles, the last one ragged; features that need two parts and two chunks of a gradient. Row
// tiles within one program, and of several.
bool check_pairs() {
  const Case cases[] = {
      {"float32, self", mcl::Dtype::float32, 100, 0, 70, 2, 100, false, 9},
      {"float16, both sides", mcl::Dtype::float16, 70, 90, 81, 2, 60, false, 1},
      {"bfloat16, different labels", mcl::Dtype::bfloat16, 66, 150, 72, 3, 40, true, 2},
  };
  bool good = true;
  for (const Case& c : cases) good &= check<float>(c);
  return good & check<double>({"float64, both sides", mcl::Dtype::float64, 40, 70, 33, 1, 30, false});
}

// More row tiles than the block has threads, and more units than fit an int.
bool check_units() {
  constexpr int ROWS = 520, PROGRAMS = 1000, COLUMNS = 2'000'000'000;
  std::vector<int64_t> begin(ROWS), end(ROWS, COLUMNS);
  end[7] = 0;  // a row tile without columns has one unit
  std::vector<char> list;
  mcl::UnitProblem problem{{{}, nullptr, ROWS, begin.data(), end.data(), nullptr, nullptr, nullptr}, 1, false,
                           {ROWS, PROGRAMS, nullptr, nullptr, nullptr, nullptr}};
  mcl::count_units(problem, [&](int64_t bytes) { list.resize(bytes); return list.data(); }, nullptr);
  const int64_t units = int64_t(ROWS - 1) * COLUMNS + 1;
  bool good = problem.work.tile_units[ROWS] == units && problem.work.program_units[PROGRAMS] == units;
  for (int64_t program = 0; program < PROGRAMS; program++) {
    const int64_t unit = problem.work.program_units[program], row_tile = problem.work.program_tiles[program];
    good &= unit == program * units / PROGRAMS && problem.work.tile_units[row_tile] <= unit &&
            unit < problem.work.tile_units[row_tile + 1];
  }
  std::printf("%-32s %s\n", "work list", good ? "good" : "WRONG");
  return good;
}

// Columns of two tiles of the plan: the second tile, padded to a power of two, overwrites all of the first.
bool check_plans() {
  cuda_on_cpu::holds_grids = false;
  const bool without = check_plan({"plan, no grid is held", mcl::Dtype::float32, 60, 1100, 1, 5, 40, false}, true);
  cuda_on_cpu::holds_grids = true;
  return without & check_plan({"plan, self", mcl::Dtype::float32, 100, 0, 1, 5, 100, false}, false) &
         check_plan({"plan, both sides", mcl::Dtype::float32, 60, 1600, 1, 5, 40, true}, false) &
         check_plan({"plan, tiles sorted once", mcl::Dtype::float32, 2100, 60, 1, 5, 40, false}, true);
}

// k-means: with up to 32 centres two blocks share the tiles and sum them, with more the rows are summed by pieces.
template <class T>
bool check_clusters(const Case& c, bool cosine) {
  const Side x = make_side(c.rows, c, 1), center_side = make_side(c.columns, c, 2);
  const int n = c.rows, k = c.columns;
  const int64_t d = c.width;
  const bool half = c.dtype == mcl::Dtype::float16 || c.dtype == mcl::Dtype::bfloat16;

  std::vector<T> offset(d, cosine ? T(0) : T(0.25)), centers(k * d), half_norms(k), distances(n), inverse_norms(n);
  // Rows whose two lowest scores are close to each other are undecided, and not summed.
  const std::vector<T> limits = {1, 0, 0, 0, 0, 0, T(cosine ? 1e-3 : 0.1), 0};
  std::vector<T> points(k * d);
  const std::unique_ptr<bool[]> undecided(new bool[n]);
  std::vector<char> high, low;
  for (int j = 0; j < k; j++) {
    double norm = 0;
    for (int64_t f = 0; f < d; f++) norm += std::pow(center_side.values[j * d + f], 2);
    for (int64_t f = 0; f < d; f++) {
      T& center = centers[j * d + f] = T(center_side.values[j * d + f] / (cosine ? std::sqrt(norm) : 1) + 1e-3);
      points[j * d + f] = center + offset[f];
      if (!cosine) half_norms[j] += center * center / 2 + (half ? center * offset[f] : T(0));
      const auto in_parts = [&](auto part) {
        append(high, part);
        append(low, mcl::rounded<decltype(part)>(float(center) - mcl::wide(part)));
      };
      if (c.dtype == mcl::Dtype::float16) in_parts(mcl::rounded<__half>(float(center)));
      else if (c.dtype == mcl::Dtype::bfloat16) in_parts(mcl::rounded<__nv_bfloat16>(float(center)));
      else append(high, center);
    }
  }
  // For entries below 8.
  const std::vector<T> rounding(d, T(std::is_same_v<T, double> ? 1.5 * 4096 : 1.5 * (1 << 23)));
  const std::vector<float> factor(d, float(1 << 19));
  const std::vector<double> step(d, std::ldexp(1.0, -32));
  const mcl::FixedPoint<T> entries{rounding.data(), factor.data(), step.data()};
  const auto matrix = [&](const std::vector<char>& bytes) {
    return mcl::Matrix{bytes.data(), d, 1, c.dtype, d * int64_t(half ? 2 : sizeof(T)) % 16 == 0};
  };
  const mcl::Samples<T> samples{matrix(x.bytes), n, d, offset.data(), cosine ? inverse_norms.data() : nullptr};

  constexpr int BLOCKS = 2, PIECE = 20;
  const bool few = k <= 32;
  const int parts = few ? 1 : 3;  // of which one has no centres
  std::vector<T> part_scores(2 * parts * n);
  std::vector<int> part_labels(parts * n);
  std::vector<int64_t> labels(n), counts(BLOCKS * k);
  std::vector<double> sums(BLOCKS * k * d);
  mcl::assign_clusters(mcl::AssignProblem<T>{samples, half, matrix(high), matrix(half ? low : high), points.data(),
                                             half_norms.data(), limits.data(), k, labels.data(), distances.data(),
                                             undecided.get(), entries,
                                             few ? sums.data() : nullptr, few ? counts.data() : nullptr, BLOCKS,
                                             parts, part_scores.data(), part_labels.data()},
                       nullptr);
  for (int64_t at = 0; few && at < k * d; at++) sums[at] += sums[k * d + at];
  if (!few) {
    std::vector<int64_t> order(n), begin, end, first, last;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return labels[i] < labels[j]; });
    for (int64_t j = 0, at = 0; j < k; j++) {
      first.push_back(begin.size());
      for (const int64_t past = at + std::count(labels.begin(), labels.end(), j); at < past; at = end.back()) {
        begin.push_back(at);
        end.push_back(std::min(at + PIECE, past));
      }
      last.push_back(begin.size());
    }
    std::vector<double> pieces(begin.size() * d);
    mcl::sum_pieces(mcl::PieceProblem<T>{samples, entries, order.data(), begin.data(), end.data(),
                                         int64_t(begin.size()), pieces.data()},
                    nullptr);
    mcl::join_pieces(mcl::JoinProblem{pieces.data(), first.data(), last.data(), k, d, sums.data()}, nullptr);
  }

  std::vector<double> exact_distances(n), exact_sums(k * d);
  std::vector<int64_t> exact_counts(k);
  const int64_t undecided_count = std::count(undecided.get(), undecided.get() + n, true);
  for (int i = 0; i < n; i++) {
    double norm = 0;
    for (int64_t f = 0; f < d; f++) norm += std::pow(x.values[i * d + f], 2);
    const auto entry = [&](int64_t f) {
      return cosine ? x.values[i * d + f] / std::sqrt(norm) : x.values[i * d + f] - offset[f];
    };
    exact_distances[i] = INFINITY;
    for (int j = 0; j < k; j++) {
      double square = 0;
      for (int64_t f = 0; f < d; f++) square += std::pow(entry(f) - centers[j * d + f], 2);
      exact_distances[i] = std::min(exact_distances[i], cosine ? square / 2 : square);
    }
    if (undecided[i]) distances[i] = exact_distances[i];
    if (undecided[i] && (few || cosine)) continue;
    exact_counts[labels[i]]++;
    for (int64_t f = 0; f < d; f++) exact_sums[labels[i] * d + f] += entry(f);
  }
  bool counted = undecided_count > 0 && undecided_count < n;
  for (int j = 0; few && j < k; j++) counted &= counts[j] + counts[k + j] == exact_counts[j];
  sums.resize(k * d);
  const std::vector<double> found(distances.begin(), distances.end());
  const bool good = counted & (largest_error("distances", found, exact_distances) < 1e-5) &
                    (largest_error("sums", sums, exact_sums) < 1e-6);
  std::printf("%-32s %s\n", c.name, good ? "good" : "WRONG");
  return good;
}

// Several tiles per block; centres in two tiles.
bool check_kmeans() {
  return check_clusters<float>({"k-means, float32", mcl::Dtype::float32, 300, 20, 72, 1, 1, false}, false) &
         check_clusters<float>({"k-means, float16, cosine", mcl::Dtype::float16, 270, 5, 81, 1, 1, false}, true) &
         check_clusters<float>({"k-means, bfloat16, many", mcl::Dtype::bfloat16, 100, 90, 72, 1, 1, false}, false) &
         check_clusters<double>({"k-means, float64, many", mcl::Dtype::float64, 70, 40, 33, 1, 1, false}, true);
}

}  // namespace

int main(int arguments, char** argument) {
  if (arguments == 1) return check_pairs() & check_units() & check_plans() & check_kmeans() ? 0 : 1;
  cuda_on_cpu::left_out = argument[1];
  // Only the checks that run a kernel of this file.
  const std::string file(argument[1], std::strcspn(argument[1], "."));
  if (file == "plan") return check_plans() ? 0 : 1;
  if (file == "kmeans_assign" || file == "kmeans_sums") return check_kmeans() ? 0 : 1;
  return check_pairs() ? 0 : 1;
}
