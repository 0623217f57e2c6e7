// Binds the kernels of k-means to torch.
#include <ATen/ops/amax.h>
#include <ATen/ops/amin.h>
#include <ATen/ops/full.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/select.h>
#include <ATen/ops/slice.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "dispatch.h"
#include "operators.h"
#include "tensors.h"

namespace mcl {
namespace {

using ClusterPass = std::tuple<Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t PART_ROWS = 32 * 96;  // rows that a thread takes at a time: a multiple of CLUSTER_ROWS

// Sums and counts for each thread, to which it adds its rows; none if sums are not requested. Sums are exact, so their
// total has the same bits for any number of threads.
struct ThreadSums {
  int64_t threads, centers, size;  // size: elements of a thread's sums
  Tensor sums, counts;

  ThreadSums(int64_t threads, int64_t levels, int64_t centers, int64_t columns, const at::TensorOptions& options)
      : threads(threads),
        centers(centers),
        size(levels * centers * columns),
        sums(at::empty({threads * levels * centers, columns}, options.dtype(at::kDouble))),
        counts(at::empty({threads * centers}, options.dtype(at::kLong))) {}

  // Sets the sums and counts of a thread to 0, by that thread: at::zeros would open a parallel region of its own.
  void clear(int64_t thread) {
    if (threads == 0) return;
    std::fill_n(thread_sums(thread), size, 0.0);
    std::fill_n(thread_counts(thread), centers, 0);
  }

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

// Labels of an earlier pass, and what bounds a row's distances.
struct Earlier {
  OptionalTensor labels, upper, lower, order, shifts;
};

template <class T>
void set_earlier(const Earlier& earlier, int64_t n, int64_t k, Clusters<T>& clusters) {
  clusters.groups = earlier.lower ? earlier.lower->size(1) : 0;
  TORCH_CHECK(!earlier.lower || (clusters.groups >= 1 && clusters.groups <= (k <= FEW ? 1 : MAX_GROUPS)),
              "bounds must have 1 to ", MAX_GROUPS, " groups, and 1 for few centres: got ", clusters.groups);
  TORCH_CHECK(!earlier.labels || earlier.labels->numel() == n, "followed must have a label for each row");
  const auto memory = [](const OptionalTensor& x, int64_t size) -> float* {
    if (!x) return nullptr;
    TORCH_CHECK(x->is_contiguous() && x->numel() == size && x->scalar_type() == at::kFloat,
                "upper, lower and shifts must be contiguous, fp32, and of all rows and centres");
    return x->mutable_data_ptr<float>();
  };
  TORCH_CHECK(!earlier.labels || earlier.labels->is_contiguous(), "followed must be contiguous");
  TORCH_CHECK(!earlier.order || (earlier.order->is_contiguous() && earlier.order->numel() == k &&
                                 earlier.order->scalar_type() == at::kInt && earlier.lower && k > FEW),
              "order must be contiguous, int32, and of all centres, with bounds of groups");
  clusters.order = earlier.order ? earlier.order->const_data_ptr<int32_t>() : nullptr;
  TORCH_CHECK(earlier.upper.has_value() == earlier.lower.has_value() && (earlier.labels || !earlier.upper) &&
                  (earlier.upper || !earlier.shifts),
              "shifts need bounds, and bounds followed labels");
  clusters.followed = earlier.labels ? earlier.labels->mutable_data_ptr<int32_t>() : nullptr;
  clusters.upper = memory(earlier.upper, n);
  clusters.lower = memory(earlier.lower, n * clusters.groups);
  clusters.shifts = memory(earlier.shifts, k);
}

template <class T>
ClusterPass assign(const Tensor& x, const Tensor& points, const Tensor& offset, const Tensor& rounding, bool cosine,
                   bool with_sums, const Earlier& earlier, const OptionalTensor& weights) {
  const Kernels<T> kernels = choose_kernels<T>(false);
  const Tensor rows = with_dense_rows(x), dense_points = points.contiguous(), dense_offset = offset.contiguous();
  const Tensor dense_rounding = rounding.contiguous();
  const int64_t n = x.size(0), width = x.size(1), k = points.size(0), columns = rounding.size(1);
  TORCH_CHECK(!with_sums || columns == width + weights.has_value(), "weighted sums have a column more: got ", columns);
  TORCH_CHECK(!weights || (weights->is_contiguous() && weights->numel() == n),
              "weights must be contiguous, one for each row");
  Tensor labels = at::empty({earlier.labels ? 0 : n}, x.options().dtype(at::kLong));
  Tensor distances = at::empty({n}, points.options());

  Clusters<T> clusters{};
  clusters.rows = {rows.const_data_ptr(), rows.stride(0), dtype_of(x)};
  clusters.width = width;
  clusters.centers = k;
  clusters.cosine = cosine;
  clusters.points = dense_points.const_data_ptr<T>();
  clusters.levels = rounding.size(0);
  clusters.rounding = dense_rounding.const_data_ptr<double>();
  clusters.weights = weights ? weights->const_data_ptr<double>() : nullptr;
  clusters.labels = earlier.labels ? nullptr : labels.mutable_data_ptr<int64_t>();
  clusters.distances = distances.mutable_data_ptr<T>();
  clusters.every_distance = !with_sums;
  set_earlier(earlier, n, k, clusters);
  const Workspace packed(kernels.packed_centers_bytes(width, k));
  kernels.pack_centers(clusters, clusters.points, dense_offset.const_data_ptr<T>(), packed.data);

  const int64_t parts = (n + PART_ROWS - 1) / PART_ROWS;
  const int64_t threads = std::max<int64_t>(std::min(thread_count(), parts), 1);
  const int64_t bytes = (kernels.cluster_workspace_bytes(width) + 63) / 64 * 64;  // a thread's, aligned
  const Workspace workspace(threads * bytes);
  ThreadSums sums(with_sums ? threads : 0, clusters.levels, k, columns, points.options());
  std::atomic<int64_t> next{0};
  parallel_for(threads, [&](int64_t thread) {
    sums.clear(thread);
    for (int64_t part = next++; part < parts; part = next++)
      kernels.cluster_rows(clusters, packed.data, part * PART_ROWS, std::min(n, (part + 1) * PART_ROWS),
                           sums.thread_sums(thread), sums.thread_counts(thread), workspace.data + thread * bytes);
  });
  return std::tuple_cat(std::tuple(labels, distances), sums.total());
}

template <class T>
Tensor survey(const Tensor& x, const OptionalTensor& middle) {
  const Kernels<T> kernels = choose_kernels<T>(false);
  const Tensor rows = with_dense_rows(x);
  const int64_t n = x.size(0), width = x.size(1), parts = (n + PART_ROWS - 1) / PART_ROWS;
  const int64_t threads = std::max<int64_t>(std::min(thread_count(), parts), 1);
  const auto options = x.options().dtype(at::CppTypeToScalarType<T>());
  const OptionalTensor dense_middle = middle ? OptionalTensor(middle->to(options).contiguous()) : std::nullopt;
  TORCH_CHECK(!middle || middle->numel() == width, "middle must have a value for each column");
  const Tensor found = at::full({threads, 3, width}, std::numeric_limits<T>::infinity(), options);
  found.select(1, 1).neg_();
  const Tensor copies = at::empty({threads, SURVEYED_AT_ONCE, width}, options);
  const Matrix matrix = {rows.const_data_ptr(), rows.stride(0), dtype_of(x)};
  std::atomic<int64_t> next{0};
  parallel_for(threads, [&](int64_t thread) {
    for (int64_t part = next++; part < parts; part = next++)
      kernels.survey_rows(matrix, dense_middle ? dense_middle->const_data_ptr<T>() : nullptr, width, part * PART_ROWS,
                          std::min(n, (part + 1) * PART_ROWS), found.mutable_data_ptr<T>() + thread * 3 * width,
                          copies.mutable_data_ptr<T>() + thread * SURVEYED_AT_ONCE * width);
  });
  return at::stack({found.select(1, 0).amin(0), found.select(1, 1).amax(0), found.select(1, 2).amin(0)});
}

}  // namespace

Tensor survey_rows(const Tensor& x, const OptionalTensor& middle) {
  return x.scalar_type() == at::kDouble ? survey<double>(x, middle) : survey<float>(x, middle);
}

ClusterPass assign_clusters(const Tensor& x, at::TensorList centers, bool cosine, bool with_sums,
                            const OptionalTensor& followed, const OptionalTensor& upper, const OptionalTensor& lower,
                            const OptionalTensor& order, const OptionalTensor& shifts,
                            const OptionalTensor& weights) {
  TORCH_CHECK(centers.size() == 3, "centers must be [centers, offset, rounding]: got ", centers.size(), " tensors");
  const Tensor &points = centers[0], &offset = centers[1], &rounding = centers[2];
  const Earlier earlier = {followed, upper, lower, order, shifts};
  return points.scalar_type() == at::kDouble
             ? assign<double>(x, points, offset, rounding, cosine, with_sums, earlier, weights)
             : assign<float>(x, points, offset, rounding, cosine, with_sums, earlier, weights);
}

}  // namespace mcl
