// Checks the kernels without torch: forward, backward, counting and clustering are compared with sums in double
// precision, and must give the same bits for any number of threads. `make sanitize` builds and runs it under
// AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer. Threads are std::thread, since
// ThreadSanitizer does not support those of OpenMP.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "task_runner.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace {

using mcl::Negatives;

struct Rows {
  int64_t size, width;
  std::vector<float> values;
  std::vector<uint16_t> halves;  // the same in bfloat16, if the case is bfloat16
  std::vector<int64_t> labels, ids;
};

struct Case {
  const char* name;
  int64_t queries, keys, width;  // keys 0: the self form
  int64_t labels, ids;           // number of different ones
  Negatives negatives;
  bool both_sides, bfloat16;
  float scale;
  int64_t enough_tasks = 16;  // fewer: larger blocks
};

Rows make_rows(int64_t size, const Case& c, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 1 / std::sqrt(float(c.width)));
  Rows rows{size, c.width, {}, {}, {}, {}};
  for (int64_t i = 0; i < size * c.width; i++) {
    float value = normal(random);
    if (c.bfloat16) {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      rows.halves.push_back(bits >> 16);
      bits &= 0xffff0000u;
      std::memcpy(&value, &bits, 4);
    }
    rows.values.push_back(value);
  }
  for (int64_t i = 0; i < size; i++) {
    rows.labels.push_back(int64_t(random() % (c.labels + 1)) - 1);  // -1: matches nothing
    rows.ids.push_back(c.keys ? random() % c.ids : i % c.ids);
  }
  return rows;
}

struct Results {
  std::vector<float> row_lse, column_lse, grad_query, grad_key, grad_scale;
  std::vector<int64_t> count;

  bool same_bits(const Results& other) const {
    const auto same = [](const auto& a, const auto& b) {
      return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0);
    };
    return same(row_lse, other.row_lse) && same(column_lse, other.column_lse) && same(grad_query, other.grad_query) &&
           same(grad_key, other.grad_key) && same(grad_scale, other.grad_scale) && same(count, other.count);
  }
};

void on_threads(int64_t threads, const std::function<void(int64_t)>& work) {
  std::vector<std::thread> pool;
  for (int64_t thread = 0; thread < threads; thread++) pool.emplace_back(work, thread);
  for (std::thread& thread : pool) thread.join();
}

float weight(int64_t i) { return 0.5f + i % 7; }  // the gradient of an LSE

Results compute(const Case& c, const Rows& query, const Rows& key, int64_t threads) {
  const bool self = !c.keys;
  const mcl::Identity query_identity{query.size, query.labels.data(), query.ids.data()};
  const mcl::Identity key_identity{key.size, key.labels.data(), key.ids.data()};
  std::vector<int64_t> query_order(query.size), key_order(key.size), begin(query.size), end(query.size);
  mcl::sort_rows(query_identity, c.negatives, query_order.data());
  mcl::sort_rows(key_identity, c.negatives, key_order.data());
  mcl::find_key_ranges(query_identity, query_order.data(), key_identity, key_order.data(), c.negatives, begin.data(),
                       end.data());
  const auto segments = mcl::find_segments(query.size, begin.data(), end.data());
  const mcl::Dropped dropped =
      mcl::find_dropped(query_identity, query_order.data(), key_identity, key_order.data(), c.negatives, segments);
  const mcl::Schedule schedule = mcl::make_schedule(segments, query.size, key.size, self, c.enough_tasks);

  mcl::Problem<float> p{};
  const auto side = [&](const Rows& rows, const std::vector<int64_t>& order, const std::vector<int32_t>& code) {
    const void* data = c.bfloat16 ? static_cast<const void*>(rows.halves.data()) : rows.values.data();
    const auto dtype = c.bfloat16 ? mcl::Dtype::bfloat16 : mcl::Dtype::float32;
    return mcl::Side{{data, rows.width, dtype}, order.data(), code.empty() ? nullptr : code.data()};
  };
  p.query = side(query, query_order, dropped.query_code);
  p.key = side(key, key_order, dropped.key_code);
  p.width = c.width;
  p.self = self;
  p.scale = &c.scale;
  p.drop_begin = dropped.begin.data();
  p.drop_end = dropped.end.data();

  const mcl::Kernels<float> kernels = mcl::choose_kernels<float>(c.bfloat16);
  const int64_t bytes = kernels.workspace_bytes(c.width, schedule.max_rows, schedule.max_columns);
  char* workspace = static_cast<char*>(std::aligned_alloc(64, threads * bytes));
  const auto run = [&](mcl::TaskFunction<float> function) {
    mcl::run_tasks<float>(schedule, function, p, threads, workspace, bytes, on_threads);
  };

  const float lowest = -INFINITY;
  std::vector<float> row_shift(query.size, lowest), row_total(query.size), column_shift(key.size, lowest),
      column_total(key.size);
  p.row_shift = row_shift.data();
  p.row_total = row_total.data();
  if (self || c.both_sides) {
    p.column_shift = self ? row_shift.data() : column_shift.data();
    p.column_total = self ? row_total.data() : column_total.data();
  }
  run(kernels.forward);

  Results r;
  r.row_lse.resize(query.size);
  for (int64_t i = 0; i < query.size; i++) r.row_lse[query_order[i]] = row_shift[i] + std::log(row_total[i]);
  std::vector<float> row_grad, column_grad;
  for (int64_t i = 0; i < query.size; i++) row_grad.push_back(weight(i));
  p.row_lse = r.row_lse.data();
  p.row_grad = row_grad.data();
  if (self) {
    p.column_lse = p.row_lse;
    p.column_grad = p.row_grad;
  } else if (c.both_sides) {
    r.column_lse.resize(key.size);
    for (int64_t j = 0; j < key.size; j++) r.column_lse[key_order[j]] = column_shift[j] + std::log(column_total[j]);
    for (int64_t j = 0; j < key.size; j++) column_grad.push_back(weight(j));
    p.column_lse = r.column_lse.data();
    p.column_grad = column_grad.data();
  }
  r.grad_query.resize(query.size * c.width);
  r.grad_key.resize(self ? 0 : key.size * c.width);
  r.grad_scale.resize(query.size);
  p.grad_query = r.grad_query.data();
  p.grad_key = self ? nullptr : r.grad_key.data();
  p.grad_scale = r.grad_scale.data();
  run(kernels.backward);

  if (!self) {
    const std::vector<float> threshold(query.size, 0.01f);
    r.count.resize(query.size);
    p.threshold = threshold.data();
    p.count = r.count.data();
    run(kernels.count);
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(workspace, threads * bytes);
#endif
  std::free(workspace);
  return r;
}

bool kept(const Case& c, const Rows& query, int64_t i, const Rows& key, int64_t j) {
  if (query.labels[i] < 0 || key.labels[j] < 0 || query.ids[i] == key.ids[j]) return false;
  if (c.negatives == Negatives::all) return true;
  return (query.labels[i] == key.labels[j]) == (c.negatives == Negatives::same);
}

Results definition(const Case& c, const Rows& query, const Rows& key) {
  const int64_t n = query.size, m = key.size, d = c.width;
  std::vector<double> row(n), column(m), products(n * m);
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < m; j++) {
      if (!kept(c, query, i, key, j)) continue;
      double& product = products[i * m + j];
      for (int64_t k = 0; k < d; k++) product += double(query.values[i * d + k]) * key.values[j * d + k];
      row[i] += std::exp(c.scale * product);
      column[j] += std::exp(c.scale * product);
    }
  Results r;
  for (double sum : row) r.row_lse.push_back(std::log(sum));
  if (c.keys && c.both_sides)
    for (double sum : column) r.column_lse.push_back(std::log(sum));
  std::vector<double> grad_query(n * d), grad_key(m * d), grad_scale(n);
  double total = 0;
  for (int64_t i = 0; i < n; i++) {
    if (c.keys) r.count.push_back(0);
    for (int64_t j = 0; j < m; j++) {
      if (!kept(c, query, i, key, j)) continue;
      const double product = products[i * m + j];
      if (c.keys) r.count.back() += !(product <= 0.01);
      double w = weight(i) * std::exp(c.scale * product) / row[i];
      if (c.keys && c.both_sides) w += weight(j) * std::exp(c.scale * product) / column[j];
      total += w * product;
      for (int64_t k = 0; k < d; k++) {
        grad_query[i * d + k] += c.scale * w * key.values[j * d + k];
        grad_key[j * d + k] += c.scale * w * query.values[i * d + k];
      }
    }
  }
  if (!c.keys)
    for (int64_t i = 0; i < n * d; i++) grad_query[i] += grad_key[i];
  r.grad_query.assign(grad_query.begin(), grad_query.end());
  if (c.keys) r.grad_key.assign(grad_key.begin(), grad_key.end());
  r.grad_scale.push_back(total);
  return r;
}

bool near(const char* what, const std::vector<float>& got, const std::vector<float>& wanted, float tolerance) {
  float largest = 0, error = 0;
  bool same_infinities = got.size() == wanted.size();
  for (size_t i = 0; i < wanted.size() && same_infinities; i++) {
    same_infinities = std::isfinite(got[i]) == std::isfinite(wanted[i]);
    if (!std::isfinite(wanted[i])) continue;
    largest = std::max(largest, std::abs(wanted[i]));
    error = std::max(error, std::abs(got[i] - wanted[i]));
  }
  const bool good = same_infinities && error <= tolerance * largest;
  if (!good) std::printf("  %s: error %g of %g\n", what, error, largest);
  return good;
}

bool check(const Case& c) {
  const Rows query = make_rows(c.queries, c, 1), key = c.keys ? make_rows(c.keys, c, 2) : query;
  const Results one = compute(c, query, key, 1), exact = definition(c, query, key);
  bool good = true;
  for (const int64_t threads : {2, 4})
    if (!one.same_bits(compute(c, query, key, threads))) {
      std::printf("  other bits with %d threads\n", int(threads));
      good = false;
    }
  // The weights of bfloat16 rows are rounded to bfloat16.
  const float gradient_tolerance = c.bfloat16 ? 1e-2f : 2e-5f;
  good &= near("row LSE", one.row_lse, exact.row_lse, 1e-5f);
  good &= near("column LSE", one.column_lse, exact.column_lse, 1e-5f);
  good &= near("gradient of the queries", one.grad_query, exact.grad_query, gradient_tolerance);
  good &= near("gradient of the keys", one.grad_key, exact.grad_key, gradient_tolerance);
  float grad_scale = 0;
  for (float part : one.grad_scale) grad_scale += part;
  good &= near("gradient of the scale", {grad_scale}, exact.grad_scale, 1e-4f);
  good &= one.count == exact.count;
  std::printf("%-8s %-32s %s\n", mcl::instruction_set().c_str(), c.name, good ? "good" : "WRONG");
  return good;
}

// Checks unit rows and their gradients, with a row of zeros and rows whose squares overflow. Blocks of memory have
// exactly the size of the rows, so that AddressSanitizer detects accesses past them.
bool check_unit_rows(int64_t width, bool paired) {
  const int64_t size = 7, total = size * width;
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 1);
  const auto draw = [&](int64_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = normal(random);
    return values;
  };
  std::vector<float> x[2] = {draw(total), draw(total)};
  std::fill_n(x[0].begin() + 2 * width, width, 0.0f);
  const auto enlarge = [&](std::vector<float>& rows, int64_t row) {
    for (int64_t d = 0; d < width; d++) rows[row * width + d] = std::copysign(3e38f, rows[row * width + d]);
  };
  enlarge(x[0], 3), enlarge(x[0], 5), enlarge(x[1], 4), enlarge(x[1], 5);
  const std::vector<float> g[2] = {draw(total), draw(total)}, w = draw(size);
  std::vector<float> unit[2] = {x[0], x[1]}, grad[2] = {x[0], x[1]}, cosine(size);
  const mcl::Views<float> views{x[0].data(), paired ? x[1].data() : nullptr, width, width, width};
  const mcl::Kernels<float> kernels = mcl::choose_kernels<float>(false);
  kernels.unit_rows(views, 0, size, unit[0].data(), unit[1].data(), cosine.data());
  kernels.unit_rows_backward(views, 0, size, g[0].data(), g[1].data(), w.data(), grad[0].data(), grad[1].data());

  Results got, exact;
  for (int64_t i = 0; i < size; i++) {
    double inverse[2], product = 0;
    const auto at = [&](const std::vector<float>* rows, int v, int64_t d) -> double { return rows[v][i * width + d]; };
    for (int v = 0; v < 2; v++) {
      double square = 0;
      for (int64_t d = 0; d < width; d++) square += at(x, v, d) * at(x, v, d);
      inverse[v] = square == 0 ? 0 : 1 / std::sqrt(square);
    }
    for (int64_t d = 0; d < width; d++) product += at(x, 0, d) * at(x, 1, d) * inverse[0] * inverse[1];
    if (paired) got.column_lse.push_back(cosine[i]), exact.column_lse.push_back(product);
    for (int v = 0; v < (paired ? 2 : 1); v++) {
      const auto incoming = [&](int64_t d) {
        return at(g, v, d) + (paired ? w[i] * at(x, 1 - v, d) * inverse[1 - v] : 0);
      };
      double along = 0;
      for (int64_t d = 0; d < width; d++) along += at(x, v, d) * inverse[v] * incoming(d);
      for (int64_t d = 0; d < width; d++) {
        got.row_lse.push_back(at(unit, v, d)), exact.row_lse.push_back(at(x, v, d) * inverse[v]);
        // Multiplied by the norm of the row: gradients of large rows are small.
        got.grad_query.push_back(inverse[v] == 0 ? at(grad, v, d) : at(grad, v, d) / inverse[v]);
        exact.grad_query.push_back(inverse[v] == 0 ? 0 : incoming(d) - at(x, v, d) * inverse[v] * along);
      }
    }
  }
  bool good = near("unit rows", got.row_lse, exact.row_lse, 1e-6f);
  good &= near("cosines", got.column_lse, exact.column_lse, 1e-6f);
  // A row with one element has gradient 0, and the result is rounding.
  good &= width == 1 || near("gradient of the rows", got.grad_query, exact.grad_query, 1e-5f);
  std::printf("%-8s unit rows of %3d, %-18s %s\n", mcl::instruction_set().c_str(), int(width),
              paired ? "two views" : "one", good ? "good" : "WRONG");
  return good;
}

// Checks one pass of k-means by two threads against a loop over all centres in double precision.
bool check_clusters(int64_t size, int64_t width, int64_t count, bool cosine, bool weighted = false) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> rows(size * width), centers(count * width), distances(size), offset(width, cosine ? 0 : 3);
  std::vector<int64_t> labels(size);
  for (float& x : rows) x = 3 + normal(random);
  for (int64_t j = 0; j < count; j++) {
    double norm = 0;
    for (int64_t d = 0; d < width; d++) {
      centers[j * width + d] = rows[(j * size / count) * width + d];
      norm += double(centers[j * width + d]) * centers[j * width + d];
    }
    for (int64_t d = 0; d < width && cosine; d++) centers[j * width + d] /= std::sqrt(norm);
  }
  // Two equal centres: the labels of their rows depend on rounding.
  std::copy_n(centers.begin(), width, centers.end() - width);

  const mcl::Kernels<float> kernels = mcl::choose_kernels<float>(false);
  mcl::Clusters<float> clusters{};
  clusters.rows = {rows.data(), width, mcl::Dtype::float32};
  clusters.width = width;
  clusters.centers = count;
  clusters.cosine = cosine;
  clusters.points = centers.data();
  // Two levels of sums: the second one sums what the first one rounds off.
  const int64_t columns = width + weighted;
  std::vector<double> rounding(2 * columns, 1.5 * std::ldexp(1.0, 40));
  std::fill_n(rounding.begin() + columns, columns, 1.5);
  clusters.levels = 2;
  clusters.rounding = rounding.data();
  std::vector<double> weights(size, 1);
  for (int64_t i = 0; i < size && weighted; i++) weights[i] = i % 3 / 2.0;
  clusters.weights = weighted ? weights.data() : nullptr;
  std::vector<int32_t> before(size);
  for (int64_t i = 0; i < size; i++) before[i] = int32_t(i % (count + 1)) - 1;
  std::vector<int32_t> followed = before;
  clusters.followed = followed.data();
  clusters.labels = labels.data();
  clusters.distances = distances.data();
  const auto round_up = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  char* packed = static_cast<char*>(std::aligned_alloc(64, round_up(kernels.packed_centers_bytes(width, count))));
  const int64_t bytes = round_up(kernels.cluster_workspace_bytes(width));
  char* workspace = static_cast<char*>(std::aligned_alloc(64, 2 * bytes));
  kernels.pack_centers(clusters, centers.data(), offset.data(), packed);
  const int64_t level = count * columns;
  std::vector<double> sums(2 * 2 * level);  // two threads, two levels
  std::vector<int64_t> counts(2 * count);
  on_threads(2, [&](int64_t thread) {
    kernels.cluster_rows(clusters, packed, thread * size / 2, (thread + 1) * size / 2, &sums[thread * 2 * level],
                         &counts[thread * count], workspace + thread * bytes);
  });

  std::vector<double> expected(count * width), sizes(count);
  double error = 0;
  for (int64_t i = 0; i < size; i++) {
    double norm = 0, nearest = INFINITY, own = 0;
    for (int64_t d = 0; d < width; d++) norm += double(rows[i * width + d]) * rows[i * width + d];
    const double factor = cosine ? 1 / std::sqrt(norm) : 1;
    for (int64_t j = 0; j < count; j++) {
      double distance = 0;
      for (int64_t d = 0; d < width; d++) {
        const double difference = factor * rows[i * width + d] - centers[j * width + d];
        distance += difference * difference / (cosine ? 2 : 1);
      }
      nearest = std::min(nearest, distance);
      if (j == labels[i]) own = distance;
    }
    if (followed[i] != labels[i]) error = INFINITY;
    error = std::max({error, std::abs(own - nearest), std::abs(distances[i] - nearest) / (1 + nearest)});
    for (int64_t d = 0; d < width; d++) {
      const double entry = weights[i] * factor * rows[i * width + d];
      expected[labels[i] * width + d] += entry;
      if (before[i] >= 0) expected[before[i] * width + d] -= entry;
    }
    sizes[labels[i]] += weights[i];
    if (before[i] >= 0) sizes[before[i]] -= weights[i];
  }
  for (int64_t j = 0; j < count; j++)
    for (int64_t d = 0; d < columns; d++) {
      const int64_t at = j * columns + d;
      double sum = sums[at] + sums[level + at] + sums[2 * level + at] + sums[3 * level + at];
      const double wanted = d < width ? expected[j * width + d] : sizes[j];
      if (d < width) sum += sizes[j] * offset[d];
      error = std::max(error, std::abs(sum - wanted) / (1 + std::abs(wanted)));
      if (!weighted && sizes[j] != double(counts[j] + counts[count + j])) error = INFINITY;
    }
  // A pass that sets bounds, one that leaves out rows after small shifts, and one that finds all distances again.
  clusters.groups = count <= mcl::FEW ? 1 : std::clamp<int64_t>((count + 31) / 32, 1, mcl::MAX_GROUPS);
  std::vector<int32_t> order(count);
  for (int64_t j = 0; j < count; j++) order[j] = int32_t(count - 1 - j);
  clusters.order = count <= mcl::FEW ? nullptr : order.data();
  std::vector<float> upper(size, INFINITY), lower(size * clusters.groups), shifts(count, 1e-5f);
  clusters.upper = upper.data();
  clusters.lower = lower.data();
  clusters.labels = nullptr;
  for (int pass = 0; pass < 3; pass++) {
    clusters.shifts = pass > 0 ? shifts.data() : nullptr;
    kernels.pack_centers(clusters, centers.data(), offset.data(), packed);
    clusters.every_distance = pass == 2;
    std::fill(distances.begin(), distances.end(), NAN);
    on_threads(2, [&](int64_t thread) {
      kernels.cluster_rows(clusters, packed, thread * size / 2, (thread + 1) * size / 2, &sums[thread * 2 * level],
                           &counts[thread * count], workspace + thread * bytes);
    });
    for (int64_t i = 0; i < size; i++)
      if (followed[i] != labels[i] || (pass != 1 && std::isnan(distances[i]))) error = INFINITY;
  }
  for (char* memory : {packed, workspace}) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory, memory == packed ? kernels.packed_centers_bytes(width, count) : 2 * bytes);
#endif
    std::free(memory);
  }
  const bool good = error <= 1e-5;
  std::printf("%-8s %3d clusters of %3d rows of %3d%s%s: error %.1g, %s\n", mcl::instruction_set().c_str(),
              int(count), int(size), int(width), cosine ? ", cosine" : "", weighted ? ", weighted" : "", error,
              good ? "good" : "WRONG");
  return good;
}

// Checks a step of k-means++ after two centres against distances in double precision. Blocks of memory have exactly the
// size that the kernels may use.
bool check_seeding(int64_t size, int64_t width, int64_t count) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> rows(size * width), offset(width, 3);
  for (float& x : rows) x = 3 + normal(random);
  std::copy_n(rows.begin(), width, rows.end() - width);  // equal to a centre
  const auto distance = [&](int64_t i, int64_t j) {
    double sum = 0;
    for (int64_t d = 0; d < width; d++) {
      const double difference = double(rows[i * width + d]) - double(rows[j * width + d]);
      sum += difference * difference;
    }
    return sum;
  };
  const std::vector<int64_t> centers = {0, 1};
  std::vector<int64_t> candidates(count);
  for (int64_t j = 0; j < count; j++) candidates[j] = 2 + j * (size - 2) / count;
  std::vector<double> nearest(size);
  std::vector<int32_t> labels(size);
  for (int64_t i = 0; i < size; i++) {
    nearest[i] = std::min(distance(i, 0), distance(i, 1));
    labels[i] = distance(i, 1) < distance(i, 0);
  }

  const mcl::Kernels<float> kernels = mcl::choose_kernels<float>(false);
  const int64_t code_stride = (width + 63) / 64 * 64, padded = (count + 7) / 8 * 8;
  const int64_t stride = kernels.seeding_stride(width);
  std::vector<int8_t> codes(size * code_stride);
  std::vector<mcl::RowCode<float>> row_codes(size);
  std::vector<int64_t> positions(size);
  for (int64_t i = 0; i < size; i++) positions[i] = i;
  const mcl::SampledRows<float> sampled = {rows.data(), width, positions.data()};
  kernels.code_rows(sampled, offset.data(), width, code_stride, 0, size, codes.data(), row_codes.data());
  std::vector<float> candidate_rows(padded * stride), relative(padded * stride);
  std::vector<double> squares(padded), norms(padded), limits(2 * count), lowest_limits(2);
  mcl::Seeding<float> seeding{};
  seeding.rows = sampled, seeding.offset = offset.data();
  seeding.width = width;
  seeding.centers = 2;
  seeding.nearest = nearest.data(), seeding.labels = labels.data();
  seeding.candidates = count, seeding.stride = stride;
  seeding.stored = candidate_rows.data(), seeding.relative = relative.data();
  seeding.squares = squares.data(), seeding.norms = norms.data();
  seeding.limits = limits.data(), seeding.lowest = lowest_limits.data();
  kernels.begin_seeding_step(seeding, candidates.data(), centers.data());

  double error = 0;
  for (const bool coded : {false, true}) {
    seeding.codes = coded ? codes.data() : nullptr;
    seeding.code_stride = code_stride;
    seeding.row_codes = row_codes.data();
    for (int64_t begin = 0; begin < size; begin += mcl::SEEDING_ROWS) {
      const int64_t end = std::min(size, begin + mcl::SEEDING_ROWS);
      std::vector<int64_t> nearer(end - begin);
      std::vector<double> distances(nearer.size() * count), gains(count), expected(count);
      const mcl::SeedingCounts counts =
          kernels.compare_with_candidates(seeding, begin, end, nearer.data(), distances.data(), gains.data());
      int64_t entry = 0;
      for (int64_t i = begin; i < end; i++) {
        bool any = false;
        for (int64_t j = 0; j < count; j++) {
          const double to_candidate = distance(i, candidates[j]), gain = std::max(nearest[i] - to_candidate, 0.0);
          expected[j] += gain;
          any |= gain > 0;
        }
        if (any && (entry >= counts.nearer || nearer[entry++] != i)) error = INFINITY;
      }
      if (entry != counts.nearer) error = INFINITY;
      for (int64_t j = 0; j < count; j++) error = std::max(error, std::abs(gains[j] - expected[j]) / (1 + expected[j]));
    }
  }
  const bool good = error <= 1e-5;
  std::printf("%-8s k-means++ of %3d rows of %3d, %2d candidates: error %.1g, %s\n", mcl::instruction_set().c_str(),
              int(size), int(width), int(count), error, good ? "good" : "WRONG");
  return good;
}

}  // namespace

int main() {
  // Sizes around a tile of 192 and a vector of 16; several blocks in one cluster; ids shared across labels.
  const Case cases[] = {
      {"self, one cluster", 700, 0, 20, 1, 700, Negatives::same, true, false, 5},
      {"self, small clusters", 385, 0, 7, 60, 385, Negatives::same, true, false, 5},
      {"self, two views", 400, 0, 33, 3, 200, Negatives::same, true, false, 100},
      {"self, different", 300, 0, 16, 4, 40, Negatives::different, true, false, 5},
      {"one direction", 193, 577, 17, 2, 100, Negatives::same, false, false, 10},
      {"both directions", 500, 300, 64, 1, 300, Negatives::all, true, false, 100},
      {"both directions, different", 200, 250, 3, 5, 50, Negatives::different, true, false, 5},
      {"self, bfloat16", 450, 0, 40, 2, 225, Negatives::same, true, true, 5},
      {"both directions, bfloat16", 210, 390, 129, 1, 100, Negatives::same, true, true, 20},
      {"self, a block of many tiles", 576, 0, 20, 1, 576, Negatives::same, true, false, 5, 1},
      {"self, blocks of one tile", 1150, 0, 9, 1, 1150, Negatives::same, true, false, 5, 3},
      {"both directions, large blocks", 400, 577, 12, 1, 300, Negatives::same, true, false, 5, 1},
      {"self, bfloat16, large blocks", 576, 0, 40, 1, 576, Negatives::same, true, true, 5, 1},
      {"one row", 1, 0, 4, 1, 1, Negatives::same, true, false, 1},
  };
  bool good = true;
  for (const char* name : {"amx", "avx512", "avx2", "portable"}) {
    setenv("MCL_KERNELS_CPU", name, 1);
    try {
      mcl::instruction_set();
    } catch (const std::runtime_error&) {
      std::printf("%-8s does not run on this CPU\n", name);
      continue;
    }
    for (const Case& c : cases) good &= check(c);
    for (const int64_t width : {1, 15, 16, 129})
      for (const bool paired : {false, true}) good &= check_unit_rows(width, paired);
    good &= check_seeding(300, 65, 11);
    good &= check_seeding(40, 64, 1);
    good &= check_seeding(520, 3, 8);
    for (const bool cosine : {false, true}) {
      good &= check_clusters(5, 1, 1, cosine);
      good &= check_clusters(250, 33, 17, cosine);
      good &= check_clusters(400, 130, 200, cosine);
      good &= check_clusters(250, 37, 17, cosine, true);
      good &= check_clusters(301, 48, 10, cosine, true);
      good &= check_clusters(301, 48, 10, cosine);  // rows that are read in place, and an incomplete last block
    }
  }
  return good ? 0 : 1;
}
