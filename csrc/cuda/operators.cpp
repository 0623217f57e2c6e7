// The operators of namespace MCL_NAMESPACE: tensors in, tensors filled. Called by the modules named cuda in
// mcl_kernels and by logsumexp/device_plan.py, which check, allocate, and know which launches make a pass.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <string>

#include "launch.h"

namespace mcl {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// To the device of the tensors, whichever is the current one, and its stream.
struct OnDevice {
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;

  explicit OnDevice(const Tensor& x) : guard(x.device()), stream(c10::cuda::getCurrentCUDAStream(x.device().index())) {}
};

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // or torch would raise it again, for its next launch
  TORCH_CHECK(false, "impl='cuda': ", cudaGetErrorString(error));
}

template <class T>
const T* pointer(const OptionalTensor& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}
template <class T>
T* mutable_pointer(const OptionalTensor& x) {
  return x ? x->mutable_data_ptr<T>() : nullptr;
}

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::float32;
    case at::kDouble: return Dtype::float64;
    case at::kBFloat16: return Dtype::bfloat16;
    case at::kHalf: return Dtype::float16;
    default: TORCH_CHECK(false, "embeddings must be float16, bfloat16, float32 or float64: got ", x.scalar_type());
  }
}

// `operand`: the type that is multiplied; rows of others are read number by number.
Matrix matrix(const Tensor& x, at::ScalarType operand) {
  const bool dense = x.size(1) <= 1 || x.stride(1) == 1;
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 &&
                       x.stride(0) * x.element_size() % 16 == 0;
  return {x.const_data_ptr(), x.stride(0), x.stride(1), dtype_of(x), dense && aligned && x.scalar_type() == operand};
}

int checked_size(const Tensor& x) {
  constexpr int MOST = std::numeric_limits<int>::max() - (1 << 16);  // positions of tiles behind the last row, too
  TORCH_CHECK(x.size(0) <= MOST, "impl='cuda' takes at most ", MOST, " rows: got ", x.size(0));
  return int(x.size(0));
}

// The arguments of every kernel of one side's rows against the other's.
struct PairTensors {
  const Tensor &x, &order, &begin, &end;
  const OptionalTensor &drop_begin, &drop_end, &ids;
  const Tensor &y, &column_order;
  const OptionalTensor& column_ids;
  bool skips_tiles;
  const Tensor& scale;

  bool half() const { return x.scalar_type() == y.scalar_type() && x.element_size() == 2; }

  template <class T>
  Pairs<T> pairs() const {
    checked_size(y);
    const at::ScalarType operand = half() ? x.scalar_type() : scale.scalar_type();
    return {{matrix(x, operand), order.const_data_ptr<int64_t>(), checked_size(x), begin.const_data_ptr<int64_t>(),
             end.const_data_ptr<int64_t>(), pointer<int32_t>(drop_begin), pointer<int32_t>(drop_end),
             pointer<int64_t>(ids)},
            {matrix(y, operand), column_order.const_data_ptr<int64_t>(), pointer<int64_t>(column_ids)},
            x.size(1),
            half(),
            skips_tiles,
            scale.const_data_ptr<T>(),
            scale.dim()};
  }
};

template <class T>
void forward_as(const PairTensors& tensors, const OptionalTensor& threshold, const Tensor& result) {
  ForwardProblem<T> problem{tensors.pairs<T>(), nullptr, pointer<T>(threshold), nullptr};
  if (threshold)
    problem.count = result.mutable_data_ptr<int64_t>();
  else
    problem.lse = result.mutable_data_ptr<T>();
  const OnDevice on(tensors.x);
  check(masked_lse_forward(problem, on.stream));
}

void forward(const Tensor& x, const Tensor& order, const Tensor& begin, const Tensor& end,
             const OptionalTensor& drop_begin, const OptionalTensor& drop_end, const OptionalTensor& ids,
             const Tensor& y, const Tensor& column_order, const OptionalTensor& column_ids, bool skips_tiles,
             const Tensor& scale, const OptionalTensor& threshold, const Tensor& result) {
  const PairTensors tensors{x, order,        begin,      end,         drop_begin, drop_end, ids,
                            y, column_order, column_ids, skips_tiles, scale};
  scale.scalar_type() == at::kDouble ? forward_as<double>(tensors, threshold, result)
                                     : forward_as<float>(tensors, threshold, result);
}

struct TermTensors {
  const OptionalTensor &row_lse, &row_weight, &column_lse, &column_weight, &column_scale, &unit;
};

template <class T>
void backward_as(const PairTensors& tensors, const TermTensors& terms, const OptionalTensor& grad_x,
                 const OptionalTensor& grad_scale) {
  const BackwardProblem<T> problem{tensors.pairs<T>(),
                                   pointer<T>(terms.row_lse),
                                   pointer<T>(terms.row_weight),
                                   pointer<T>(terms.column_lse),
                                   pointer<T>(terms.column_weight),
                                   pointer<T>(terms.column_scale),
                                   pointer<T>(terms.unit),
                                   grad_x ? grad_x->mutable_data_ptr() : nullptr,
                                   mutable_pointer<T>(grad_scale)};
  const OnDevice on(tensors.x);
  check(masked_lse_backward(problem, on.stream));
}

void backward(const Tensor& x, const Tensor& order, const Tensor& begin, const Tensor& end,
              const OptionalTensor& drop_begin, const OptionalTensor& drop_end, const OptionalTensor& ids,
              const Tensor& y, const Tensor& column_order, const OptionalTensor& column_ids, bool skips_tiles,
              const Tensor& scale, const OptionalTensor& row_lse, const OptionalTensor& row_weight,
              const OptionalTensor& column_lse, const OptionalTensor& column_weight,
              const OptionalTensor& column_scale, const OptionalTensor& unit, const OptionalTensor& grad_x,
              const OptionalTensor& grad_scale) {
  const PairTensors tensors{x, order,        begin,      end,         drop_begin, drop_end, ids,
                            y, column_order, column_ids, skips_tiles, scale};
  const TermTensors terms{row_lse, row_weight, column_lse, column_weight, column_scale, unit};
  scale.scalar_type() == at::kDouble ? backward_as<double>(tensors, terms, grad_x, grad_scale)
                                     : backward_as<float>(tensors, terms, grad_x, grad_scale);
}

PlanSide plan_side(const OptionalTensor& labels, const OptionalTensor& ids, int64_t n, const OptionalTensor& order,
                   const OptionalTensor& begin, const OptionalTensor& end) {
  return {pointer<int64_t>(labels),        pointer<int64_t>(ids),           int(n),
          mutable_pointer<int64_t>(order), mutable_pointer<int64_t>(begin), mutable_pointer<int64_t>(end)};
}

// `like`: any tensor of the device. `n` and `m` are at most what planning by these kernels is for.
void plan(const Tensor& like, const OptionalTensor& labels, const OptionalTensor& ids, int64_t n,
          const OptionalTensor& key_labels, const OptionalTensor& key_ids, int64_t m, bool self, int64_t negatives,
          const OptionalTensor& order, const OptionalTensor& begin, const OptionalTensor& end,
          const OptionalTensor& key_order, const OptionalTensor& sorted_tiles) {
  const PlanProblem problem{plan_side(labels, ids, n, order, begin, end),
                            plan_side(key_labels, key_ids, m, key_order, {}, {}), self, Negatives(negatives),
                            mutable_pointer<int64_t>(sorted_tiles)};
  const OnDevice on(like);
  check(make_plan(problem, on.stream));
}

void dropped(const Tensor& order, const Tensor& begin, const Tensor& end, const Tensor& values,
             const Tensor& column_order, const Tensor& column_values, const Tensor& drop_begin,
             const Tensor& drop_end) {
  const DropProblem problem{order.const_data_ptr<int64_t>(),
                            begin.const_data_ptr<int64_t>(),
                            end.const_data_ptr<int64_t>(),
                            values.const_data_ptr<int64_t>(),
                            column_order.const_data_ptr<int64_t>(),
                            column_values.const_data_ptr<int64_t>(),
                            checked_size(order),
                            drop_begin.mutable_data_ptr<int32_t>(),
                            drop_end.mutable_data_ptr<int32_t>()};
  const OnDevice on(order);
  check(find_dropped(problem, on.stream));
}

// Rows of k-means and how their entries are summed; inverse norms are there where the metric is cosine.
struct SampleTensors {
  const Tensor &x, &offset;
  const OptionalTensor &inverse_norms, &rounding, &scale, &unit;

  // `operand`: the type that rows are multiplied in.
  template <class T>
  Samples<T> samples(at::ScalarType operand) const {
    return {matrix(x, operand), x.size(0), x.size(1), inverse_norms ? nullptr : offset.const_data_ptr<T>(),
            mutable_pointer<T>(inverse_norms)};
  }
  template <class T>
  FixedPoint<T> entries() const {
    return {pointer<T>(rounding), pointer<float>(scale), pointer<double>(unit)};
  }
};

struct AssignTensors {
  const Tensor &high, &low, &centers, &half_norms, &limits, &labels, &distances, &undecided;
  const OptionalTensor &sums, &counts;
};

template <class T>
void assign_as(const SampleTensors& rows, const AssignTensors& of) {
  const at::ScalarType operand = of.high.scalar_type();
  const AssignProblem<T> problem{rows.samples<T>(operand),
                                 operand != of.centers.scalar_type(),
                                 matrix(of.high, operand),
                                 matrix(of.low, operand),
                                 of.centers.const_data_ptr<T>(),
                                 of.half_norms.const_data_ptr<T>(),
                                 of.limits.const_data_ptr<T>(),
                                 checked_size(of.centers),
                                 of.labels.mutable_data_ptr<int64_t>(),
                                 of.distances.mutable_data_ptr<T>(),
                                 of.undecided.mutable_data_ptr<bool>(),
                                 rows.entries<T>(),
                                 mutable_pointer<double>(of.sums),
                                 mutable_pointer<int64_t>(of.counts),
                                 of.sums ? checked_size(*of.sums) : 0};
  const OnDevice on(rows.x);
  check(assign_clusters(problem, on.stream));
}

void assign(const Tensor& x, const Tensor& offset, const OptionalTensor& inverse_norms,
            const OptionalTensor& rounding, const OptionalTensor& scale, const OptionalTensor& unit,
            const Tensor& centers, const Tensor& high, const Tensor& low, const Tensor& half_norms,
            const Tensor& limits, const Tensor& labels, const Tensor& distances, const Tensor& undecided,
            const OptionalTensor& sums, const OptionalTensor& counts) {
  const SampleTensors rows{x, offset, inverse_norms, rounding, scale, unit};
  const AssignTensors of{high, low, centers, half_norms, limits, labels, distances, undecided, sums, counts};
  centers.scalar_type() == at::kDouble ? assign_as<double>(rows, of) : assign_as<float>(rows, of);
}

template <class T>
void sum_pieces_as(const SampleTensors& rows, const Tensor& order, const Tensor& begin, const Tensor& end,
                   const Tensor& sums) {
  const PieceProblem<T> problem{rows.samples<T>(rows.x.scalar_type()), rows.entries<T>(),
                                order.const_data_ptr<int64_t>(),       begin.const_data_ptr<int64_t>(),
                                end.const_data_ptr<int64_t>(),         begin.size(0),
                                sums.mutable_data_ptr<double>()};
  const OnDevice on(rows.x);
  check(sum_pieces(problem, on.stream));
}

void sum_by_piece(const Tensor& x, const Tensor& offset, const OptionalTensor& inverse_norms,
                  const OptionalTensor& rounding, const OptionalTensor& scale, const OptionalTensor& unit,
                  const Tensor& order, const Tensor& begin, const Tensor& end, const Tensor& sums) {
  const SampleTensors rows{x, offset, inverse_norms, rounding, scale, unit};
  offset.scalar_type() == at::kDouble ? sum_pieces_as<double>(rows, order, begin, end, sums)
                                      : sum_pieces_as<float>(rows, order, begin, end, sums);
}

void join(const Tensor& pieces, const Tensor& begin, const Tensor& end, const Tensor& sums) {
  const JoinProblem problem{pieces.const_data_ptr<double>(), begin.const_data_ptr<int64_t>(),
                            end.const_data_ptr<int64_t>(),   sums.size(0),
                            sums.size(1),                    sums.mutable_data_ptr<double>()};
  const OnDevice on(pieces);
  check(join_pieces(problem, on.stream));
}

}  // namespace
}  // namespace mcl

#define MCL_PAIRS                                                                                                    \
  "(Tensor x, Tensor order, Tensor begin, Tensor end, Tensor? drop_begin, Tensor? drop_end, Tensor? ids, Tensor y, " \
  "Tensor column_order, Tensor? column_ids, bool skips_tiles, Tensor scale, "

// On every device, since tests run the same operators on the processor; the launchers are of one device alone.
// Of torch 2.6 TORCH_LIBRARY takes the name as it is written: here it is expanded first.
#define LIBRARY_OF(name, library) TORCH_LIBRARY(name, library)
// A definition of the compiler's command line has no quotes: not every shell that it passes leaves them in.
#define TEXT_OF(...) #__VA_ARGS__
#define EXPANDED_TEXT_OF(...) TEXT_OF(__VA_ARGS__)
LIBRARY_OF(MCL_NAMESPACE, library) {
  library.def("forward" MCL_PAIRS "Tensor? threshold, Tensor(a!) result) -> ()", &mcl::forward);
  library.def("backward" MCL_PAIRS
              "Tensor? row_lse, Tensor? row_weight, Tensor? column_lse, Tensor? column_weight, Tensor? column_scale, "
              "Tensor? unit, Tensor(a!)? grad_x, Tensor(b!)? grad_scale) -> ()",
              &mcl::backward);
  library.def("assign(Tensor x, Tensor offset, Tensor(a!)? inverse_norms, Tensor? rounding, Tensor? scale, "
              "Tensor? unit, Tensor centers, Tensor high, Tensor low, Tensor half_norms, Tensor limits, "
              "Tensor(b!) labels, Tensor(c!) distances, Tensor(d!) undecided, Tensor(e!)? sums, Tensor(f!)? counts) "
              "-> ()",
              &mcl::assign);
  library.def("sum_pieces(Tensor x, Tensor offset, Tensor? inverse_norms, Tensor? rounding, Tensor? scale, "
              "Tensor? unit, Tensor order, Tensor begin, Tensor end, Tensor(a!) sums) -> ()",
              &mcl::sum_by_piece);
  library.def("join_pieces(Tensor pieces, Tensor begin, Tensor end, Tensor(a!) sums) -> ()", &mcl::join);
  library.def("plan(Tensor like, Tensor? labels, Tensor? ids, int n, Tensor? key_labels, Tensor? key_ids, int m, "
              "bool self, int negatives, Tensor(a!)? order, Tensor(b!)? begin, Tensor(c!)? end, "
              "Tensor(d!)? key_order, Tensor(e!)? sorted_tiles) -> ()",
              &mcl::plan);
  library.def("dropped(Tensor order, Tensor begin, Tensor end, Tensor values, Tensor column_order, "
              "Tensor column_values, Tensor(a!) drop_begin, Tensor(b!) drop_end) -> ()",
              &mcl::dropped);
  // Compute capabilities, as in TORCH_CUDA_ARCH_LIST but with commas.
  library.def("architectures() -> str", [] { return std::string(EXPANDED_TEXT_OF(MCL_ARCHITECTURES)); });
}
