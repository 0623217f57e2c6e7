// Binds the kernels of k-means to torch.
#include <ATen/ops/slice.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "dispatch.h"
#include "operators.h"
#include "tensors.h"

namespace mcl {
namespace {

using ClusterPass = std::tuple<Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t PART_ROWS = 8 * 96;  // rows that a thread takes at a time: a multiple of CLUSTER_ROWS

// Sums and counts for each thread, to which it adds its rows; none if sums are not requested. Sums are exact, so their
// total has the same bits for any number of threads.
struct ThreadSums {
  int64_t threads, centers, size;  // size: elements of a thread's sums
  Tensor sums, counts;

  ThreadSums(int64_t threads, int64_t levels, int64_t centers, int64_t width, const at::TensorOptions& options)
      : threads(threads),
        centers(centers),
        size(levels * centers * width),
        sums(at::zeros({threads * levels * centers, width}, options.dtype(at::kDouble))),
        counts(at::zeros({threads * centers}, options.dtype(at::kLong))) {}

  double* thread_sums(int64_t thread) { return threads ? sums.mutable_data_ptr<double>() + thread * size : nullptr; }
  int64_t* thread_counts(int64_t thread) {
    return threads ? counts.mutable_data_ptr<int64_t>() + thread * centers : nullptr;
  }

  // Adds the sums and counts of all threads to those of the first, and returns the first.
  std::tuple<Tensor, Tensor> total() {
    for (int64_t thread = 1; thread < threads; thread++) {
      add(thread_sums(thread), size, thread_sums(0));
      add(thread_counts(thread), centers, thread_counts(0));
    }
    const int64_t parts = std::max<int64_t>(threads, 1);
    return {sums.slice(0, 0, sums.size(0) / parts), counts.slice(0, 0, counts.size(0) / parts)};
  }

 private:
  template <class P>
  static void add(const P* from, int64_t count, P* to) {
    for (int64_t i = 0; i < count; i++) to[i] += from[i];
  }
};

template <class T>
ClusterPass assign(const Tensor& x, const Tensor& points, const Tensor& offset, const Tensor& rounding, bool cosine,
                   bool with_sums, const OptionalTensor& followed) {
  const Kernels<T> kernels = choose_kernels<T>(false);
  const Tensor rows = with_dense_rows(x), dense_points = points.contiguous(), dense_offset = offset.contiguous();
  const Tensor dense_rounding = rounding.contiguous();
  const int64_t n = x.size(0), width = x.size(1), k = points.size(0);
  Tensor labels = at::empty({followed ? 0 : n}, x.options().dtype(at::kLong));
  Tensor distances = at::empty({n}, points.options());
  TORCH_CHECK(!followed || followed->is_contiguous(), "followed must be contiguous");

  Clusters<T> clusters{};
  clusters.rows = {rows.const_data_ptr(), rows.stride(0), dtype_of(x)};
  clusters.width = width;
  clusters.centers = k;
  clusters.cosine = cosine;
  clusters.points = dense_points.const_data_ptr<T>();
  clusters.levels = rounding.size(0);
  clusters.rounding = dense_rounding.const_data_ptr<double>();
  clusters.followed = followed ? followed->mutable_data_ptr<int32_t>() : nullptr;
  clusters.labels = followed ? nullptr : labels.mutable_data_ptr<int64_t>();
  clusters.distances = distances.mutable_data_ptr<T>();
  const Workspace packed(kernels.packed_centers_bytes(width, k));
  kernels.pack_centers(clusters, clusters.points, dense_offset.const_data_ptr<T>(), packed.data);

  const int64_t parts = (n + PART_ROWS - 1) / PART_ROWS;
  const int64_t threads = std::max<int64_t>(std::min(thread_count(), parts), 1);
  const int64_t bytes = (kernels.cluster_workspace_bytes(width) + 63) / 64 * 64;  // a thread's, aligned
  const Workspace workspace(threads * bytes);
  ThreadSums sums(with_sums ? threads : 0, clusters.levels, k, width, points.options());
  std::atomic<int64_t> next{0};
  parallel_for(threads, [&](int64_t thread) {
    for (int64_t part = next++; part < parts; part = next++)
      kernels.cluster_rows(clusters, packed.data, part * PART_ROWS, std::min(n, (part + 1) * PART_ROWS),
                           sums.thread_sums(thread), sums.thread_counts(thread), workspace.data + thread * bytes);
  });
  return std::tuple_cat(std::tuple(labels, distances), sums.total());
}

constexpr int64_t MIN_CODED = 1 << 20, MIN_COMPARED = 1 << 25;  // elements of a thread: about a millisecond

template <class T>
std::tuple<Tensor, Tensor> code(const Tensor& x, const Tensor& offset) {
  const Kernels<T> kernels = choose_kernels<T>(false);
  const Tensor rows = with_dense_rows(x), dense_offset = offset.contiguous();
  const int64_t n = x.size(0), width = x.size(1), stride = (width + 63) / 64 * 64;
  Tensor codes = at::empty({n, stride}, x.options().dtype(at::kChar));
  Tensor constants = at::empty({n, int64_t(sizeof(RowCode<T>) / sizeof(T))}, x.options());
  const T *row_data = rows.const_data_ptr<T>(), *offset_data = dense_offset.const_data_ptr<T>();
  int8_t* code_data = codes.mutable_data_ptr<int8_t>();
  auto* constant_data = reinterpret_cast<RowCode<T>*>(constants.mutable_data_ptr<T>());
  const int64_t threads = std::max<int64_t>(std::min(thread_count(), n * width / MIN_CODED), 1);
  parallel_for(threads, [&](int64_t thread) {
    kernels.code_rows(row_data, rows.stride(0), offset_data, width, stride, n * thread / threads,
                      n * (thread + 1) / threads, code_data, constant_data);
  });
  return {codes, constants};
}

// Working memory of a step: the candidates and the limits of the centres.
template <class T>
struct SeedingMemory {
  Workspace candidates;
  std::vector<double> doubles;

  SeedingMemory(Seeding<T>& seeding, int64_t padded)
      : candidates(2 * padded * seeding.stride * sizeof(T)),
        doubles(2 * padded + std::max<int64_t>(seeding.centers, 1) * (seeding.candidates + 1)) {
    seeding.stored = reinterpret_cast<T*>(candidates.data);
    seeding.relative = seeding.stored + padded * seeding.stride;
    seeding.squares = doubles.data();
    seeding.norms = seeding.squares + padded;
    seeding.lowest = seeding.norms + padded;
    seeding.limits = seeding.lowest + std::max<int64_t>(seeding.centers, 1);
  }
};

// Rows of a block that are nearer to a candidate than to the centres, and their distances to all candidates.
struct NearerRows {
  std::vector<int64_t> rows;
  std::vector<double> distances;

  void assign(const NearerRows& from, int64_t count, int64_t candidates) {
    rows.assign(from.rows.begin(), from.rows.begin() + count);
    distances.assign(from.distances.begin(), from.distances.begin() + count * candidates);
  }
};

template <class T>
std::tuple<int64_t, int64_t> add_best(const Tensor& x, const Tensor& offset, at::TensorList codes,
                                      const Tensor& candidates, const Tensor& centers, const Tensor& nearest,
                                      const Tensor& labels, int64_t compared) {
  const Kernels<T> kernels = choose_kernels<T>(false);
  const Tensor rows = with_dense_rows(x), dense_offset = offset.contiguous();
  const int64_t n = x.size(0), count = candidates.size(0), blocks = (n + SEEDING_ROWS - 1) / SEEDING_ROWS;
  double* nearest_data = nearest.mutable_data_ptr<double>();
  int32_t* label_data = labels.mutable_data_ptr<int32_t>();

  Seeding<T> seeding{};
  seeding.rows = rows.const_data_ptr<T>();
  seeding.offset = dense_offset.const_data_ptr<T>();
  seeding.row_stride = rows.stride(0);
  seeding.width = x.size(1);
  if (!codes.empty()) {
    seeding.codes = codes[0].const_data_ptr<int8_t>();
    seeding.code_stride = codes[0].stride(0);
    seeding.row_codes = reinterpret_cast<const RowCode<T>*>(codes[1].const_data_ptr<T>());
  }
  seeding.centers = centers.size(0);
  seeding.nearest = nearest_data;
  seeding.labels = label_data;
  seeding.candidates = count;
  seeding.stride = kernels.seeding_stride(seeding.width);
  const SeedingMemory<T> memory(seeding, (count + 7) / 8 * 8);
  kernels.begin_seeding_step(seeding, candidates.const_data_ptr<int64_t>(), centers.const_data_ptr<int64_t>());

  std::vector<double> gains(blocks * count);
  std::vector<SeedingCounts> counts(blocks);
  std::vector<NearerRows> nearer(blocks);
  const int64_t useful_threads = compared * seeding.width * count / MIN_COMPARED;
  const int64_t threads = std::max<int64_t>(std::min({thread_count(), blocks, useful_threads}), 1);
  std::atomic<int64_t> next{0};
  parallel_for(threads, [&](int64_t) {
    NearerRows found{std::vector<int64_t>(SEEDING_ROWS), std::vector<double>(SEEDING_ROWS * count)};
    for (int64_t block = next++; block < blocks; block = next++) {
      const int64_t begin = block * SEEDING_ROWS, end = std::min(n, begin + SEEDING_ROWS);
      counts[block] = kernels.compare_with_candidates(seeding, begin, end, found.rows.data(), found.distances.data(),
                                                      gains.data() + block * count);
      nearer[block].assign(found, counts[block].nearer, count);
    }
  });

  // Blocks in their order, so that sums have the same bits for any number of threads.
  for (int64_t block = 1; block < blocks; block++)
    for (int64_t j = 0; j < count; j++) gains[j] += gains[block * count + j];
  const int64_t best = std::max_element(gains.begin(), gains.begin() + count) - gains.begin();
  compared = 0;
  for (int64_t block = 0; block < blocks; block++) {
    compared += counts[block].compared;
    for (int64_t i = 0; i < counts[block].nearer; i++) {
      const int64_t row = nearer[block].rows[i];
      const double distance = nearer[block].distances[i * count + best];
      if (!(distance < nearest_data[row])) continue;
      nearest_data[row] = distance;
      label_data[row] = int32_t(seeding.centers);
    }
  }
  return {best, compared};
}

}  // namespace

std::tuple<Tensor, Tensor> code_rows(const Tensor& x, const Tensor& offset) {
  return x.scalar_type() == at::kDouble ? code<double>(x, offset) : code<float>(x, offset);
}

std::tuple<int64_t, int64_t> add_center(const Tensor& x, const Tensor& offset, at::TensorList codes,
                                        const Tensor& candidates, const Tensor& centers, const Tensor& nearest,
                                        const Tensor& labels, int64_t compared) {
  return x.scalar_type() == at::kDouble
             ? add_best<double>(x, offset, codes, candidates, centers, nearest, labels, compared)
             : add_best<float>(x, offset, codes, candidates, centers, nearest, labels, compared);
}

ClusterPass assign_clusters(const Tensor& x, at::TensorList centers, bool cosine, bool with_sums,
                            const OptionalTensor& followed) {
  TORCH_CHECK(centers.size() == 3, "centers must be [centers, offset, rounding]: got ", centers.size(), " tensors");
  const Tensor &points = centers[0], &offset = centers[1], &rounding = centers[2];
  return points.scalar_type() == at::kDouble
             ? assign<double>(x, points, offset, rounding, cosine, with_sums, followed)
             : assign<float>(x, points, offset, rounding, cosine, with_sums, followed);
}

}  // namespace mcl
