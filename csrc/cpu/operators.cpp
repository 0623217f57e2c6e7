// The operators of namespace mcl_kernels_native: tensors in, tensors out. Called by mcl_kernels/logsumexp/native.py and
// mcl_kernels/normalize.py, which check the arguments.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/slice.h>
#include <ATen/ops/zeros.h>
#include <pthread.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "run.h"

namespace mcl {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::float32;
    case at::kDouble: return Dtype::float64;
    case at::kBFloat16: return Dtype::bfloat16;
    case at::kHalf: return Dtype::float16;
    default: TORCH_CHECK(false, "embeddings must be float16, bfloat16, float32 or float64: got ", x.scalar_type());
  }
}

bool both_bfloat16(const Tensor& query, const OptionalTensor& key) {
  return query.scalar_type() == at::kBFloat16 && (!key || key->scalar_type() == at::kBFloat16);
}

Negatives negatives_of(const std::string& name) {
  if (name == "same") return Negatives::same;
  if (name == "different") return Negatives::different;
  TORCH_CHECK(name == "all", "negatives must be same, different or all: got ", name);
  return Negatives::all;
}

OptionalTensor contiguous(const OptionalTensor& x) { return x ? OptionalTensor(x->contiguous()) : std::nullopt; }

const int64_t* integers(const OptionalTensor& x) { return x ? x->const_data_ptr<int64_t>() : nullptr; }

// Any row stride will do, but the entries of a row have to be neighbours.
Tensor with_dense_rows(const Tensor& x) { return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous(); }

// Labels and ids of both sides, kept alive; in the self form the keys are the queries.
struct Identities {
  OptionalTensor labels, key_labels, ids, key_ids;
  Identity query, key;
  Negatives negatives;

  Identities(const Tensor& query, const OptionalTensor& key, const OptionalTensor& labels,
             const OptionalTensor& key_labels, const OptionalTensor& ids, const OptionalTensor& key_ids,
             const std::string& negatives)
      : labels(contiguous(labels)),
        key_labels(key ? contiguous(key_labels) : this->labels),
        ids(contiguous(ids)),
        key_ids(key ? contiguous(key_ids) : this->ids),
        query{query.size(0), integers(this->labels), integers(this->ids)},
        key{key ? key->size(0) : query.size(0), integers(this->key_labels), integers(this->key_ids)},
        negatives(negatives_of(negatives)) {
    TORCH_CHECK(key || ids, "the self form needs ids");
  }
};

struct PlanTensors {
  Tensor query_order, key_order, key_begin, key_end;  // key_order is [0] in the self form

  const int64_t* sorted_keys(bool self) const {
    return (self ? query_order : key_order).const_data_ptr<int64_t>();
  }
};

PlanTensors make_plan(const Identities& identities, bool self, const Tensor& like) {
  const auto empty = [&](int64_t size) { return at::empty({size}, like.options().dtype(at::kLong)); };
  const int64_t n = identities.query.size;
  PlanTensors plan{empty(n), empty(self ? 0 : identities.key.size), empty(n), empty(n)};
  sort_rows(identities.query, identities.negatives, plan.query_order.mutable_data_ptr<int64_t>());
  if (!self) sort_rows(identities.key, identities.negatives, plan.key_order.mutable_data_ptr<int64_t>());
  find_key_ranges(identities.query, plan.query_order.const_data_ptr<int64_t>(), identities.key, plan.sorted_keys(self),
                  identities.negatives, plan.key_begin.mutable_data_ptr<int64_t>(),
                  plan.key_end.mutable_data_ptr<int64_t>());
  return plan;
}

// The threads of a parent are not there in its forked child, and OpenMP would wait for them forever.
bool forked = false;
[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

int64_t thread_count() { return forked || at::in_parallel_region() ? 1 : at::get_num_threads(); }

void parallel_for(int64_t threads, const std::function<void(int64_t)>& work) {
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++) work(thread);
  });
}

// Tasks that should be able to run side by side: enough for as many threads as this machine has cores. How many threads
// there are has no say, since the blocks decide the order of the sums.
int64_t enough_tasks() {
  static const int64_t tasks = std::clamp<int64_t>(2 * std::thread::hardware_concurrency(), 4, 64);
  return tasks;
}

// 64-byte aligned memory for the kernels.
struct Memory {
  Tensor bytes;
  char* data;

  explicit Memory(int64_t size) : bytes(at::empty({size + 64}, at::TensorOptions().dtype(at::kByte))) {
    data = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(bytes.mutable_data_ptr()) + 63) / 64 * 64);
  }
};

constexpr int64_t SMALL_WORKSPACE = 16 << 20;  // bytes that nobody misses, whatever the size of the batch

// A problem without its inputs and outputs of one direction, and all it points to.
template <class T>
struct Prepared {
  Tensor query_rows, key_rows, scale;
  Dropped dropped;
  Schedule schedule;
  Problem<T> problem{};

  Prepared(const Tensor& query, const OptionalTensor& key, const OptionalTensor& scale_tensor,
           const Identities& identities, const PlanTensors& plan)
      : query_rows(with_dense_rows(query)), key_rows(key ? with_dense_rows(*key) : query_rows) {
    const bool self = !key;
    const int64_t n = query.size(0), m = key_rows.size(0), width = query.size(1);
    const int64_t *query_order = plan.query_order.const_data_ptr<int64_t>(), *key_order = plan.sorted_keys(self);
    const std::vector<Segment> segments =
        find_segments(n, plan.key_begin.const_data_ptr<int64_t>(), plan.key_end.const_data_ptr<int64_t>());
    dropped =
        find_dropped(identities.query, query_order, identities.key, key_order, identities.negatives, segments);
    schedule = make_schedule(segments, n, m, self, enough_tasks());

    const auto code = [](const std::vector<int32_t>& codes) { return codes.empty() ? nullptr : codes.data(); };
    problem.query = {query_rows.const_data_ptr(), query_rows.stride(0), dtype_of(query), query_order,
                     code(dropped.query_code)};
    problem.key = {key_rows.const_data_ptr(), key_rows.stride(0), dtype_of(key_rows), key_order,
                   code(dropped.key_code)};
    problem.width = width;
    problem.self = self;
    problem.drop_begin = dropped.begin.data();
    problem.drop_end = dropped.end.data();
    if (scale_tensor) {
      scale = scale_tensor->contiguous();
      problem.scale = scale.const_data_ptr<T>();
      problem.scale_stride = scale.dim();
    }
  }

  void run(TaskFunction<T> function, const Kernels<T>& kernels) const {
    if (schedule.tasks.empty()) return;
    const int64_t bytes = kernels.workspace_bytes(problem.width, schedule.most_rows, schedule.most_columns);
    // With the gradients at most three times the rows in all, however many threads there are.
    const int64_t rows = query_rows.size(0) + (problem.self ? 0 : key_rows.size(0));
    const int64_t affordable = std::max<int64_t>(2 * rows * problem.width * sizeof(T), SMALL_WORKSPACE) / bytes;
    const int64_t threads = std::min({thread_count(), schedule.most_tasks, std::max<int64_t>(affordable, 1)});
    const Memory workspace(threads * bytes);
    run_tasks<T>(schedule, function, problem, threads, workspace.data, bytes, parallel_for);
  }
};

// The running sums of one side, in sorted order.
template <class T>
struct Sums {
  std::vector<T> shift, total;
  explicit Sums(int64_t size) : shift(size, -INFINITY), total(size, 0) {}

  Tensor logsumexp(const int64_t* order, const Tensor& like) const {
    const int64_t size = shift.size();
    Tensor result = at::empty({size}, like.options());
    T* lse = result.mutable_data_ptr<T>();
    for (int64_t i = 0; i < size; i++) lse[order[i]] = shift[i] + std::log(total[i]);
    return result;
  }
};

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward_as(
    const Tensor& query, const OptionalTensor& key, const Tensor& scale, const Identities& identities,
    bool bidirectional) {
  const Kernels<T> kernels = choose_kernels<T>(both_bfloat16(query, key));
  const PlanTensors plan = make_plan(identities, !key, query);
  Prepared<T> prepared(query, key, scale, identities, plan);
  Problem<T>& problem = prepared.problem;

  Sums<T> rows(query.size(0)), columns(bidirectional ? identities.key.size : 0);
  problem.row_shift = rows.shift.data();
  problem.row_total = rows.total.data();
  if (bidirectional || problem.self) {
    problem.column_shift = problem.self ? problem.row_shift : columns.shift.data();
    problem.column_total = problem.self ? problem.row_total : columns.total.data();
  }
  prepared.run(kernels.forward, kernels);
  return {rows.logsumexp(problem.query.order, scale), columns.logsumexp(problem.key.order, scale),
          plan.query_order, plan.key_order, plan.key_begin, plan.key_end};
}

// Rows that no task met have gradient 0.
template <class T>
void clear_rows(T* grad, const std::vector<bool>& met, const int64_t* order, int64_t width) {
  for (size_t row = 0; grad && row < met.size(); row++)
    if (!met[row]) std::fill_n(grad + order[row] * width, width, T(0));
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward_as(const Tensor& grad_row, const Tensor& grad_column, const Tensor& query,
                                               const OptionalTensor& key, const Tensor& scale,
                                               const Identities& identities, const Tensor& row_lse,
                                               const Tensor& column_lse, const PlanTensors& plan, bool bidirectional,
                                               c10::ArrayRef<bool> needs_grad) {
  const Kernels<T> kernels = choose_kernels<T>(both_bfloat16(query, key));
  Prepared<T> prepared(query, key, scale, identities, plan);
  Problem<T>& problem = prepared.problem;

  const Tensor row_weight = grad_row.contiguous(), column_weight = grad_column.contiguous();
  problem.row_lse = row_lse.const_data_ptr<T>();
  problem.row_grad = row_weight.const_data_ptr<T>();
  if (bidirectional || problem.self) {
    problem.column_lse = problem.self ? problem.row_lse : column_lse.const_data_ptr<T>();
    problem.column_grad = problem.self ? problem.row_grad : column_weight.const_data_ptr<T>();
  }

  const auto empty = [&](bool needed, at::IntArrayRef size) {
    return at::empty(needed ? size : at::IntArrayRef{0}, scale.options());
  };
  const bool needs_query = needs_grad[0], needs_key = needs_grad[1] && key, needs_scale = needs_grad[2];
  Tensor grad_query = empty(needs_query, query.sizes());
  Tensor grad_key = empty(needs_key, prepared.key_rows.sizes());
  std::vector<T> grad_scale_rows(needs_scale ? query.size(0) : 0);
  problem.grad_query = needs_query ? grad_query.mutable_data_ptr<T>() : nullptr;
  problem.grad_key = needs_key ? grad_key.mutable_data_ptr<T>() : nullptr;
  problem.grad_scale = needs_scale ? grad_scale_rows.data() : nullptr;
  prepared.run(kernels.backward, kernels);
  clear_rows(problem.grad_query, prepared.schedule.met_queries, problem.query.order, problem.width);
  clear_rows(problem.grad_key, prepared.schedule.met_keys, problem.key.order, problem.width);

  Tensor grad_scale = empty(needs_scale, scale.sizes());
  if (needs_scale) {
    T* to = grad_scale.mutable_data_ptr<T>();
    if (scale.dim()) {
      for (size_t i = 0; i < grad_scale_rows.size(); i++) to[problem.query.order[i]] = grad_scale_rows[i];
    } else {
      double sum = 0;
      for (T part : grad_scale_rows) sum += part;
      *to = static_cast<T>(sum);
    }
  }
  return {grad_query.to(query.scalar_type()), grad_key.to(prepared.key_rows.scalar_type()), grad_scale};
}

template <class T>
Tensor count_above_as(const Tensor& query, const Tensor& key, const Tensor& threshold, const Identities& identities) {
  const Kernels<T> kernels = choose_kernels<T>(both_bfloat16(query, key));
  const PlanTensors plan = make_plan(identities, false, query);
  Prepared<T> prepared(query, key, std::nullopt, identities, plan);
  const Tensor thresholds = threshold.contiguous();
  Tensor count = at::zeros({query.size(0)}, query.options().dtype(at::kLong));
  prepared.problem.threshold = thresholds.const_data_ptr<T>();
  prepared.problem.count = count.mutable_data_ptr<int64_t>();
  prepared.run(kernels.count, kernels);
  return count;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& query, const OptionalTensor& key, const Tensor& scale, const OptionalTensor& labels,
    const OptionalTensor& key_labels, const OptionalTensor& ids, const OptionalTensor& key_ids, std::string negatives,
    bool bidirectional) {
  const Identities identities(query, key, labels, key_labels, ids, key_ids, negatives);
  return scale.scalar_type() == at::kDouble ? forward_as<double>(query, key, scale, identities, bidirectional)
                                            : forward_as<float>(query, key, scale, identities, bidirectional);
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_row, const Tensor& grad_column, const Tensor& query, const OptionalTensor& key,
    const Tensor& scale, const OptionalTensor& labels, const OptionalTensor& key_labels, const OptionalTensor& ids,
    const OptionalTensor& key_ids, const Tensor& row_lse, const Tensor& column_lse, const Tensor& query_order,
    const Tensor& key_order, const Tensor& key_begin, const Tensor& key_end, std::string negatives, bool bidirectional,
    c10::List<bool> needs_grad) {
  const Identities identities(query, key, labels, key_labels, ids, key_ids, negatives);
  const PlanTensors plan{query_order, key_order, key_begin, key_end};
  const bool needs[3] = {needs_grad[0], needs_grad[1], needs_grad[2]};
  return scale.scalar_type() == at::kDouble
             ? backward_as<double>(grad_row, grad_column, query, key, scale, identities, row_lse, column_lse, plan,
                                   bidirectional, needs)
             : backward_as<float>(grad_row, grad_column, query, key, scale, identities, row_lse, column_lse, plan,
                                  bidirectional, needs);
}

Tensor count_above(const Tensor& query, const Tensor& key, const Tensor& threshold, const OptionalTensor& labels,
                   const OptionalTensor& key_labels, const OptionalTensor& ids, const OptionalTensor& key_ids,
                   std::string negatives) {
  const Identities identities(query, key, labels, key_labels, ids, key_ids, negatives);
  return threshold.scalar_type() == at::kDouble ? count_above_as<double>(query, key, threshold, identities)
                                                : count_above_as<float>(query, key, threshold, identities);
}

// Rows and their unit vectors: of one tensor, or of two views of the same samples.
template <class T>
struct ViewTensors {
  Tensor a, b;
  Views<T> views;

  ViewTensors(const Tensor& view_a, const OptionalTensor& view_b)
      : a(with_dense_rows(view_a)), b(view_b ? with_dense_rows(*view_b) : Tensor()) {
    views = {a.const_data_ptr<T>(), view_b ? b.const_data_ptr<T>() : nullptr, a.stride(0), view_b ? b.stride(0) : 0,
             a.size(1)};
  }

  // work(begin, end) of the samples, on all threads where there are enough of them.
  template <class Work>
  void for_each_part(const Work& work) const {
    constexpr int64_t PART = 1 << 14;  // numbers that are worth a thread
    const int64_t size = a.size(0);
    if (thread_count() == 1)
      work(0, size);
    else
      at::parallel_for(0, size, PART / std::max<int64_t>(views.width, 1) + 1, work);
  }
};

template <class T>
std::tuple<Tensor, Tensor> unit_rows_as(const Tensor& view_a, const OptionalTensor& view_b) {
  const ViewTensors<T> tensors(view_a, view_b);
  const int64_t n = view_a.size(0), width = view_a.size(1);
  Tensor rows = at::empty({view_b ? 2 * n : n, width}, view_a.options());
  Tensor cosine = at::empty({view_b ? n : 0}, view_a.options());
  T *unit = rows.mutable_data_ptr<T>(), *to = cosine.mutable_data_ptr<T>();
  const Kernels<T> kernels = choose_kernels<T>(false);
  tensors.for_each_part([&](int64_t begin, int64_t end) {
    kernels.unit_rows(tensors.views, begin, end, unit, unit + n * width, to);
  });
  return {rows, cosine};
}

template <class T>
std::tuple<Tensor, Tensor> unit_rows_backward_as(const Tensor& view_a, const OptionalTensor& view_b,
                                                 const Tensor& grad_rows, const Tensor& grad_cosine) {
  const ViewTensors<T> tensors(view_a, view_b);
  const int64_t n = view_a.size(0), width = view_a.size(1);
  const Tensor dense_rows = grad_rows.contiguous(), dense_cosine = grad_cosine.contiguous();
  Tensor grad_a = at::empty(view_a.sizes(), view_a.options());
  Tensor grad_b = at::empty(view_b ? view_a.sizes() : at::IntArrayRef{0}, view_a.options());
  const T *grad_unit = dense_rows.const_data_ptr<T>(), *weight = dense_cosine.const_data_ptr<T>();
  T *to_a = grad_a.mutable_data_ptr<T>(), *to_b = grad_b.mutable_data_ptr<T>();
  const Kernels<T> kernels = choose_kernels<T>(false);
  tensors.for_each_part([&](int64_t begin, int64_t end) {
    kernels.unit_rows_backward(tensors.views, begin, end, grad_unit, grad_unit + n * width, weight, to_a, to_b);
  });
  return {grad_a, grad_b};
}

std::tuple<Tensor, Tensor> unit_rows(const Tensor& view_a, const OptionalTensor& view_b) {
  return view_a.scalar_type() == at::kDouble ? unit_rows_as<double>(view_a, view_b)
                                             : unit_rows_as<float>(view_a, view_b);
}

std::tuple<Tensor, Tensor> unit_rows_backward(const Tensor& view_a, const OptionalTensor& view_b,
                                              const Tensor& grad_rows, const Tensor& grad_cosine) {
  return view_a.scalar_type() == at::kDouble
             ? unit_rows_backward_as<double>(view_a, view_b, grad_rows, grad_cosine)
             : unit_rows_backward_as<float>(view_a, view_b, grad_rows, grad_cosine);
}

using ClusterPass = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Labels, distances, and for each level and centre the sum of its rows relative to the offset, and their number; of these, what
// changed since the labels `followed`, which become those of this pass: no others are returned.
template <class T>
ClusterPass assign_clusters_as(const Tensor& x, const Tensor& centers, const Tensor& offset, bool cosine,
                               const Tensor& rounding, bool with_sums, const OptionalTensor& followed) {
  constexpr int64_t PART = 8 * 96;  // rows that a thread takes at a time: whole blocks
  const Kernels<T> kernels = choose_kernels<T>(false);
  const Tensor rows = with_dense_rows(x), dense_centers = centers.contiguous(),
               dense_offset = offset.contiguous(),
               dense_rounding = rounding.contiguous();
  const int64_t n = x.size(0), width = x.size(1), k = centers.size(0);
  Tensor labels = at::empty({followed ? 0 : n}, x.options().dtype(at::kLong));
  Tensor distances = at::empty({n}, centers.options());

  Clusters<T> clusters{};
  clusters.rows = {rows.const_data_ptr(), rows.stride(0), dtype_of(x), nullptr, nullptr};
  clusters.width = width;
  clusters.centers = k;
  clusters.cosine = cosine;
  clusters.points = dense_centers.const_data_ptr<T>();
  clusters.levels = rounding.size(0);
  clusters.rounding = dense_rounding.const_data_ptr<double>();
  TORCH_CHECK(!followed || followed->is_contiguous(), "followed must be contiguous");
  clusters.followed = followed ? followed->mutable_data_ptr<int32_t>() : nullptr;
  clusters.labels = followed ? nullptr : labels.mutable_data_ptr<int64_t>();
  clusters.distances = distances.mutable_data_ptr<T>();
  Memory packed(kernels.packed_centers_bytes(width, k));
  kernels.pack_centers(clusters, dense_centers.const_data_ptr<T>(), dense_offset.const_data_ptr<T>(), packed.data);

  const int64_t parts = (n + PART - 1) / PART, threads = std::max<int64_t>(std::min(thread_count(), parts), 1);
  const int64_t bytes = kernels.cluster_workspace_bytes(width);
  const Memory workspace(threads * (bytes + 64));
  const auto sizes = [&](int64_t of_thread) { return with_sums ? threads * of_thread : 0; };
  const int64_t sums_of_thread = clusters.levels * k;
  Tensor sums = at::zeros({sizes(sums_of_thread), width}, centers.options().dtype(at::kDouble));
  Tensor counts = at::zeros({sizes(k)}, labels.options());
  double* sums_data = sums.mutable_data_ptr<double>();
  int64_t* counts_data = counts.mutable_data_ptr<int64_t>();
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t thread) {
    for (int64_t part = next++; part < parts; part = next++)
      kernels.cluster_rows(clusters, packed.data, part * PART, std::min(n, (part + 1) * PART),
                           with_sums ? sums_data + thread * sums_of_thread * width : nullptr, counts_data + thread * k,
                           workspace.data + thread * ((bytes + 63) / 64 * 64));
  };
  if (threads == 1)
    work(0);
  else
    parallel_for(threads, work);
  for (int64_t thread = 1; thread < threads && with_sums; thread++) {  // exact, so in any order
    const double* of_thread = sums_data + thread * sums_of_thread * width;
    for (int64_t at = 0; at < sums_of_thread * width; at++) sums_data[at] += of_thread[at];
    for (int64_t j = 0; j < k; j++) counts_data[j] += counts_data[thread * k + j];
  }
  return {labels, distances, sums.slice(0, 0, with_sums ? sums_of_thread : 0), counts.slice(0, 0, with_sums ? k : 0)};
}

ClusterPass assign_clusters(const Tensor& x, const Tensor& centers, const Tensor& offset, bool cosine,
                            const Tensor& rounding, bool with_sums, const OptionalTensor& followed) {
  return centers.scalar_type() == at::kDouble
             ? assign_clusters_as<double>(x, centers, offset, cosine, rounding, with_sums, followed)
             : assign_clusters_as<float>(x, centers, offset, cosine, rounding, with_sums, followed);
}

}  // namespace
}  // namespace mcl

TORCH_LIBRARY(mcl_kernels_native, library) {
  library.def(
      "forward(Tensor query, Tensor? key, Tensor scale, Tensor? labels, Tensor? key_labels, Tensor? ids, "
      "Tensor? key_ids, str negatives, bool bidirectional) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "backward(Tensor grad_row, Tensor grad_column, Tensor query, Tensor? key, Tensor scale, Tensor? labels, "
      "Tensor? key_labels, Tensor? ids, Tensor? key_ids, Tensor row_lse, Tensor column_lse, Tensor query_order, "
      "Tensor key_order, Tensor key_begin, Tensor key_end, str negatives, bool bidirectional, bool[] needs_grad) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "count_above(Tensor query, Tensor key, Tensor threshold, Tensor? labels, Tensor? key_labels, Tensor? ids, "
      "Tensor? key_ids, str negatives) -> Tensor");
  library.def("unit_rows(Tensor view_a, Tensor? view_b) -> (Tensor, Tensor)");
  library.def(
      "unit_rows_backward(Tensor view_a, Tensor? view_b, Tensor grad_rows, Tensor grad_cosine) -> (Tensor, Tensor)");
  library.def(
      "assign_clusters(Tensor x, Tensor centers, Tensor offset, bool cosine, Tensor rounding, bool with_sums, "
      "Tensor(a!)? followed) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("instruction_set() -> str", &mcl::instruction_set);
}

TORCH_LIBRARY_IMPL(mcl_kernels_native, CPU, library) {
  library.impl("forward", &mcl::forward);
  library.impl("backward", &mcl::backward);
  library.impl("count_above", &mcl::count_above);
  library.impl("unit_rows", &mcl::unit_rows);
  library.impl("unit_rows_backward", &mcl::unit_rows_backward);
  library.impl("assign_clusters", &mcl::assign_clusters);
}
