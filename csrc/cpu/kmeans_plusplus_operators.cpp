// Binds the kernels of k-means++ to torch.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "dispatch.h"
#include "operators.h"
#include "tensors.h"

namespace mcl {
namespace {

constexpr int64_t MIN_CODED = 1 << 20, MIN_COMPARED = 1 << 25;  // elements of a thread: about a millisecond

// `rows` and `positions` outlive the result. Positions come from the caller's own draw, and are not checked.
template <class T>
SampledRows<T> sampled_rows(const Tensor& rows, const OptionalTensor& positions) {
  return {rows.const_data_ptr<T>(), rows.stride(0), positions ? positions->const_data_ptr<int64_t>() : nullptr};
}

template <class T>
std::tuple<Tensor, Tensor> code(const Tensor& x, const Tensor& offset, const OptionalTensor& positions) {
  const Kernels<T> kernels = choose_kernels<T>(false);
  const Tensor rows = with_dense_rows(x), dense_offset = offset.contiguous();
  const SampledRows<T> sampled = sampled_rows<T>(rows, positions);
  const int64_t n = positions ? positions->size(0) : x.size(0), width = x.size(1), stride = (width + 63) / 64 * 64;
  Tensor codes = at::empty({n, stride}, x.options().dtype(at::kChar));
  Tensor constants = at::empty({n, int64_t(sizeof(RowCode<T>) / sizeof(T))}, x.options());
  const T* offset_data = dense_offset.const_data_ptr<T>();
  int8_t* code_data = codes.mutable_data_ptr<int8_t>();
  auto* constant_data = reinterpret_cast<RowCode<T>*>(constants.mutable_data_ptr<T>());
  const int64_t threads = std::max<int64_t>(std::min(thread_count(), n * width / MIN_CODED), 1);
  parallel_for(threads, [&](int64_t thread) {
    kernels.code_rows(sampled, offset_data, width, stride, n * thread / threads, n * (thread + 1) / threads, code_data,
                      constant_data);
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
                                      const Tensor& labels, int64_t compared, const OptionalTensor& weights,
                                      const OptionalTensor& positions) {
  const Kernels<T> kernels = choose_kernels<T>(false);
  const Tensor rows = with_dense_rows(x), dense_offset = offset.contiguous();
  const int64_t n = nearest.size(0), count = candidates.size(0), blocks = (n + SEEDING_ROWS - 1) / SEEDING_ROWS;
  double* nearest_data = nearest.mutable_data_ptr<double>();
  int32_t* label_data = labels.mutable_data_ptr<int32_t>();

  Seeding<T> seeding{};
  seeding.rows = sampled_rows<T>(rows, positions);
  seeding.offset = dense_offset.const_data_ptr<T>();
  seeding.width = x.size(1);
  if (!codes.empty()) {
    seeding.codes = codes[0].const_data_ptr<int8_t>();
    seeding.code_stride = codes[0].stride(0);
    seeding.row_codes = reinterpret_cast<const RowCode<T>*>(codes[1].const_data_ptr<T>());
  }
  seeding.centers = centers.size(0);
  seeding.weights = weights ? weights->const_data_ptr<double>() : nullptr;
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

std::tuple<Tensor, Tensor> code_rows(const Tensor& x, const Tensor& offset, const OptionalTensor& positions) {
  return x.scalar_type() == at::kDouble ? code<double>(x, offset, positions) : code<float>(x, offset, positions);
}

std::tuple<int64_t, int64_t> add_center(const Tensor& x, const Tensor& offset, at::TensorList codes,
                                        const Tensor& candidates, const Tensor& centers, const Tensor& nearest,
                                        const Tensor& labels, int64_t compared, const OptionalTensor& weights,
                                        const OptionalTensor& positions) {
  return x.scalar_type() == at::kDouble
             ? add_best<double>(x, offset, codes, candidates, centers, nearest, labels, compared, weights, positions)
             : add_best<float>(x, offset, codes, candidates, centers, nearest, labels, compared, weights, positions);
}

}  // namespace mcl
