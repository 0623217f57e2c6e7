// Binds the kernels of masked_logsumexp to torch.
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "operators.h"
#include "task_runner.h"
#include "tensors.h"

namespace mcl {
namespace {

Negatives negatives_of(const std::string& name) {
  if (name == "same") return Negatives::same;
  if (name == "different") return Negatives::different;
  TORCH_CHECK(name == "all", "negatives must be same, different or all: got ", name);
  return Negatives::all;
}

// The list of operators.h, checked and contiguous. In the self form the key, its labels and its ids are the query's.
struct Inputs {
  bool self;
  Tensor query, key;
  OptionalTensor scale, labels, key_labels, ids, key_ids;
  Negatives negatives;

  Inputs(const OptionalTensors& inputs, const std::string& negatives)
      : self(checked(inputs) && !inputs.get(1)),
        query(with_dense_rows(required(inputs, 0))),
        key(self ? query : with_dense_rows(required(inputs, 1))),
        scale(contiguous(inputs.get(2))),
        labels(contiguous(inputs.get(3))),
        key_labels(self ? labels : contiguous(inputs.get(4))),
        ids(contiguous(inputs.get(5))),
        key_ids(self ? ids : contiguous(inputs.get(6))),
        negatives(negatives_of(negatives)) {
    TORCH_CHECK(!self || ids, "the self form needs ids");
  }

  bool scale_is_double() const {
    TORCH_CHECK(scale, "scale must be given");
    return scale->scalar_type() == at::kDouble;
  }

  bool both_bfloat16() const { return query.scalar_type() == at::kBFloat16 && key.scalar_type() == at::kBFloat16; }

  Identity query_identity() const { return {query.size(0), integers(labels), integers(ids)}; }
  Identity key_identity() const { return {key.size(0), integers(key_labels), integers(key_ids)}; }

 private:
  static bool checked(const OptionalTensors& inputs) {
    TORCH_CHECK(inputs.size() == 7, "inputs must be [query, key, scale, labels, key_labels, ids, key_ids]: got ",
                inputs.size(), " tensors");
    return true;
  }

  static const int64_t* integers(const OptionalTensor& x) { return x ? x->const_data_ptr<int64_t>() : nullptr; }
};

struct Plan {
  Tensor query_order, key_order, key_begin, key_end;  // key_order is [0] in the self form

  const int64_t* sorted_keys(bool self) const {
    return (self ? query_order : key_order).const_data_ptr<int64_t>();
  }
};

struct Saved {
  Tensor row_lse, column_lse;
  Plan plan;
};

Plan make_plan(const Inputs& inputs) {
  const auto empty = [&](int64_t size) { return at::empty({size}, inputs.query.options().dtype(at::kLong)); };
  const Identity query = inputs.query_identity(), key = inputs.key_identity();
  Plan plan{empty(query.size), empty(inputs.self ? 0 : key.size), empty(query.size), empty(query.size)};
  sort_rows(query, inputs.negatives, plan.query_order.mutable_data_ptr<int64_t>());
  if (!inputs.self) sort_rows(key, inputs.negatives, plan.key_order.mutable_data_ptr<int64_t>());
  find_key_ranges(query, plan.query_order.const_data_ptr<int64_t>(), key, plan.sorted_keys(inputs.self),
                  inputs.negatives, plan.key_begin.mutable_data_ptr<int64_t>(),
                  plan.key_end.mutable_data_ptr<int64_t>());
  return plan;
}

// Number of tasks that should be able to run side by side: enough for all cores of this machine. It does not depend on
// the number of threads in use, since the blocks decide the order of the sums.
int64_t enough_tasks() {
  static const int64_t tasks = std::clamp<int64_t>(2 * std::thread::hardware_concurrency(), 4, 64);
  return tasks;
}

constexpr int64_t SMALL_WORKSPACE = 16 << 20;  // bytes of workspace that are always allowed, for any batch size

// A problem without the fields of forward, backward and counting, and the memory that its pointers refer to.
template <class T>
struct PreparedProblem {
  const Inputs& inputs;
  Dropped dropped;
  Schedule schedule;
  Problem<T> problem{};

  PreparedProblem(const Inputs& inputs, const Plan& plan, const OptionalTensor& scale) : inputs(inputs) {
    const bool self = inputs.self;
    const Tensor &query = inputs.query, &key = inputs.key;
    const int64_t n = query.size(0), m = key.size(0);
    const int64_t *query_order = plan.query_order.const_data_ptr<int64_t>(), *key_order = plan.sorted_keys(self);
    const std::vector<Segment> segments =
        find_segments(n, plan.key_begin.const_data_ptr<int64_t>(), plan.key_end.const_data_ptr<int64_t>());
    dropped = find_dropped(inputs.query_identity(), query_order, inputs.key_identity(), key_order, inputs.negatives,
                           segments);
    schedule = make_schedule(segments, n, m, self, enough_tasks());

    problem.query = make_side(query, query_order, dropped.query_code);
    problem.key = make_side(key, key_order, dropped.key_code);
    problem.width = query.size(1);
    problem.self = self;
    problem.drop_begin = dropped.begin.data();
    problem.drop_end = dropped.end.data();
    if (scale) {
      problem.scale = scale->const_data_ptr<T>();
      problem.scale_stride = scale->dim();
    }
  }

  void run(TaskFunction<T> function, const Kernels<T>& kernels) const {
    if (schedule.tasks.empty()) return;
    const int64_t bytes = kernels.workspace_bytes(problem.width, schedule.max_rows, schedule.max_columns);
    // Twice the rows, or a small workspace: with the gradients, memory is at most three times the rows for any number
    // of threads.
    const int64_t rows = inputs.query.size(0) + (inputs.self ? 0 : inputs.key.size(0));
    const int64_t affordable = std::max<int64_t>(2 * rows * problem.width * sizeof(T), SMALL_WORKSPACE) / bytes;
    const int64_t threads = std::min({thread_count(), schedule.max_concurrent, std::max<int64_t>(affordable, 1)});
    const Workspace workspace(threads * bytes);
    run_tasks<T>(schedule, function, problem, threads, workspace.data, bytes, parallel_for);
  }

 private:
  static Side make_side(const Tensor& x, const int64_t* order, const std::vector<int32_t>& codes) {
    return {{x.const_data_ptr(), x.stride(0), dtype_of(x)}, order, codes.empty() ? nullptr : codes.data()};
  }
};

// The running sums of one side, in sorted order.
template <class T>
struct RunningSums {
  std::vector<T> shift, total;
  explicit RunningSums(int64_t size) : shift(size, -INFINITY), total(size, 0) {}

  Tensor logsumexp(const int64_t* order, const Tensor& like) const {
    const int64_t size = shift.size();
    Tensor result = at::empty({size}, like.options());
    T* lse = result.mutable_data_ptr<T>();
    for (int64_t i = 0; i < size; i++) lse[order[i]] = shift[i] + std::log(total[i]);
    return result;
  }
};

template <class T>
Saved forward(const Inputs& inputs, bool bidirectional) {
  const Kernels<T> kernels = choose_kernels<T>(inputs.both_bfloat16());
  const Plan plan = make_plan(inputs);
  PreparedProblem<T> prepared(inputs, plan, inputs.scale);
  Problem<T>& problem = prepared.problem;

  RunningSums<T> rows(inputs.query.size(0)), columns(bidirectional ? inputs.key.size(0) : 0);
  problem.row_shift = rows.shift.data();
  problem.row_total = rows.total.data();
  if (bidirectional || problem.self) {
    problem.column_shift = problem.self ? problem.row_shift : columns.shift.data();
    problem.column_total = problem.self ? problem.row_total : columns.total.data();
  }
  prepared.run(kernels.forward, kernels);
  return {rows.logsumexp(problem.query.order, *inputs.scale), columns.logsumexp(problem.key.order, *inputs.scale),
          plan};
}

// Sets the gradient of rows that no task visited to 0.
template <class T>
void clear_rows(T* grad, const std::vector<bool>& visited, const int64_t* order, int64_t width) {
  for (size_t row = 0; grad && row < visited.size(); row++)
    if (!visited[row]) std::fill_n(grad + order[row] * width, width, T(0));
}

// Writes the gradient of the scale, given the gradient for the scale of each sorted row.
template <class T>
void write_grad_scale(const std::vector<T>& grad_rows, const int64_t* order, Tensor& grad_scale) {
  T* to = grad_scale.mutable_data_ptr<T>();
  if (grad_scale.dim()) {
    for (size_t i = 0; i < grad_rows.size(); i++) to[order[i]] = grad_rows[i];
  } else {
    double sum = 0;
    for (T part : grad_rows) sum += part;
    *to = static_cast<T>(sum);
  }
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Inputs& inputs, const Saved& saved, const Tensor& grad_row,
                                            const Tensor& grad_column, bool bidirectional,
                                            const std::array<bool, 3>& needs_grad) {
  const Kernels<T> kernels = choose_kernels<T>(inputs.both_bfloat16());
  PreparedProblem<T> prepared(inputs, saved.plan, inputs.scale);
  Problem<T>& problem = prepared.problem;

  const Tensor row_weight = grad_row.contiguous(), column_weight = grad_column.contiguous();
  problem.row_lse = saved.row_lse.const_data_ptr<T>();
  problem.row_grad = row_weight.const_data_ptr<T>();
  if (bidirectional || problem.self) {
    problem.column_lse = problem.self ? problem.row_lse : saved.column_lse.const_data_ptr<T>();
    problem.column_grad = problem.self ? problem.row_grad : column_weight.const_data_ptr<T>();
  }

  const auto empty = [&](bool needed, at::IntArrayRef size) {
    return at::empty(needed ? size : at::IntArrayRef{0}, inputs.scale->options());
  };
  const bool needs_query = needs_grad[0], needs_key = needs_grad[1] && !inputs.self, needs_scale = needs_grad[2];
  Tensor grad_query = empty(needs_query, inputs.query.sizes());
  Tensor grad_key = empty(needs_key, inputs.key.sizes());
  Tensor grad_scale = empty(needs_scale, inputs.scale->sizes());
  std::vector<T> grad_scale_rows(needs_scale ? inputs.query.size(0) : 0);
  problem.grad_query = needs_query ? grad_query.mutable_data_ptr<T>() : nullptr;
  problem.grad_key = needs_key ? grad_key.mutable_data_ptr<T>() : nullptr;
  problem.grad_scale = needs_scale ? grad_scale_rows.data() : nullptr;
  prepared.run(kernels.backward, kernels);
  clear_rows(problem.grad_query, prepared.schedule.visited_queries, problem.query.order, problem.width);
  clear_rows(problem.grad_key, prepared.schedule.visited_keys, problem.key.order, problem.width);
  if (needs_scale) write_grad_scale(grad_scale_rows, problem.query.order, grad_scale);
  return {grad_query.to(inputs.query.scalar_type()), grad_key.to(inputs.key.scalar_type()), grad_scale};
}

template <class T>
Tensor count(const Inputs& inputs, const Tensor& threshold) {
  const Kernels<T> kernels = choose_kernels<T>(inputs.both_bfloat16());
  const Plan plan = make_plan(inputs);
  PreparedProblem<T> prepared(inputs, plan, std::nullopt);
  Tensor counts = at::zeros({inputs.query.size(0)}, inputs.query.options().dtype(at::kLong));
  prepared.problem.threshold = threshold.const_data_ptr<T>();
  prepared.problem.count = counts.mutable_data_ptr<int64_t>();
  prepared.run(kernels.count, kernels);
  return counts;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> masked_lse_forward(const OptionalTensors& list,
                                                                              const std::string& negatives,
                                                                              bool bidirectional) {
  const Inputs inputs(list, negatives);
  const Saved saved = inputs.scale_is_double() ? forward<double>(inputs, bidirectional)
                                               : forward<float>(inputs, bidirectional);
  const Plan& plan = saved.plan;
  return {saved.row_lse, saved.column_lse, plan.query_order, plan.key_order, plan.key_begin, plan.key_end};
}

std::tuple<Tensor, Tensor, Tensor> masked_lse_backward(const OptionalTensors& list, at::TensorList saved_list,
                                                       at::TensorList grads, const std::string& negatives,
                                                       bool bidirectional, std::array<bool, 3> needs_grad) {
  TORCH_CHECK(saved_list.size() == 6 && grads.size() == 2, "saved must be the 6 results of masked_lse_forward, and ",
              "grads the gradients of 2: got ", saved_list.size(), " and ", grads.size(), " tensors");
  const Inputs inputs(list, negatives);
  const Saved saved{saved_list[0], saved_list[1], {saved_list[2], saved_list[3], saved_list[4], saved_list[5]}};
  return inputs.scale_is_double() ? backward<double>(inputs, saved, grads[0], grads[1], bidirectional, needs_grad)
                                  : backward<float>(inputs, saved, grads[0], grads[1], bidirectional, needs_grad);
}

Tensor count_above(const OptionalTensors& list, const Tensor& threshold, const std::string& negatives) {
  const Inputs inputs(list, negatives);
  TORCH_CHECK(!inputs.self, "count_above needs a key");
  const Tensor thresholds = threshold.contiguous();
  return threshold.scalar_type() == at::kDouble ? count<double>(inputs, thresholds) : count<float>(inputs, thresholds);
}

}  // namespace mcl
