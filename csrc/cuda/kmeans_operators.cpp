// Binds the kernels of k-means to torch.
#include "launch.h"
#include "operators.h"
#include "tensors.h"

namespace mcl {
namespace {

// The tensors of `Samples` and `FixedPoint`, kept alive during the launch.
struct SampleTensors {
  const Tensor x, offset;
  const OptionalTensor rounding, factor, step;
  const OptionalTensor& inverse_norms;

  SampleTensors(const OptionalTensors& samples, const OptionalTensor& inverse_norms)
      : x(required(samples, 0)),
        offset(required(samples, 1)),
        rounding(samples.get(2)),
        factor(samples.get(3)),
        step(samples.get(4)),
        inverse_norms(inverse_norms) {}

  // `operand`: the type in which rows are multiplied.
  template <class T>
  Samples<T> samples(at::ScalarType operand) const {
    return {matrix(x, operand), x.size(0), x.size(1), inverse_norms ? nullptr : offset.const_data_ptr<T>(),
            mutable_pointer<T>(inverse_norms)};
  }
  template <class T>
  FixedPoint<T> entries() const {
    return {pointer<T>(rounding), pointer<float>(factor), pointer<double>(step)};
  }
};

// Results of an assignment, without sums and counts with many centres; and the workspace of several parts of these.
struct AssignResults {
  const Tensor &labels, &distances, &undecided;
  const OptionalTensor &sums, &counts, &part_scores, &part_labels;
};

template <class T>
void assign(const SampleTensors& rows, at::TensorList tensors, const AssignResults& results) {
  const Tensor &centers = tensors[0], &high = tensors[1], &low = tensors[2], &half_norms = tensors[3],
               &limits = tensors[4];
  const at::ScalarType operand = high.scalar_type();
  const AssignProblem<T> problem{rows.samples<T>(operand),
                                 operand != centers.scalar_type(),
                                 matrix(high, operand),
                                 matrix(low, operand),
                                 centers.const_data_ptr<T>(),
                                 half_norms.const_data_ptr<T>(),
                                 limits.const_data_ptr<T>(),
                                 checked_size(centers),
                                 results.labels.mutable_data_ptr<int64_t>(),
                                 results.distances.mutable_data_ptr<T>(),
                                 results.undecided.mutable_data_ptr<bool>(),
                                 rows.entries<T>(),
                                 mutable_pointer<double>(results.sums),
                                 mutable_pointer<int64_t>(results.counts),
                                 results.sums ? checked_size(*results.sums) : 0,
                                 results.part_labels ? checked_size(*results.part_labels) : 1,
                                 mutable_pointer<T>(results.part_scores),
                                 mutable_pointer<int>(results.part_labels)};
  const OnDevice on(rows.x);
  check(assign_clusters(problem, on.stream));
}

template <class T>
void sum(const SampleTensors& rows, at::TensorList pieces, const Tensor& sums) {
  const PieceProblem<T> problem{rows.samples<T>(rows.x.scalar_type()),
                                rows.entries<T>(),
                                pieces[0].const_data_ptr<int64_t>(),
                                pieces[1].const_data_ptr<int64_t>(),
                                pieces[2].const_data_ptr<int64_t>(),
                                pieces[1].size(0),
                                sums.mutable_data_ptr<double>()};
  const OnDevice on(rows.x);
  check(sum_pieces(problem, on.stream));
}

}  // namespace

void assign_clusters(const OptionalTensors& samples, const OptionalTensor& inverse_norms, at::TensorList centers,
                     const Tensor& labels, const Tensor& distances, const Tensor& undecided,
                     const OptionalTensor& sums, const OptionalTensor& counts, const OptionalTensor& part_scores,
                     const OptionalTensor& part_labels) {
  const SampleTensors rows(samples, inverse_norms);
  const AssignResults results{labels, distances, undecided, sums, counts, part_scores, part_labels};
  centers[0].scalar_type() == at::kDouble ? assign<double>(rows, centers, results)
                                          : assign<float>(rows, centers, results);
}

void sum_pieces(const OptionalTensors& samples, const OptionalTensor& inverse_norms, at::TensorList pieces,
                const Tensor& sums) {
  const SampleTensors rows(samples, inverse_norms);
  rows.offset.scalar_type() == at::kDouble ? sum<double>(rows, pieces, sums) : sum<float>(rows, pieces, sums);
}

void join_pieces(const Tensor& pieces, const Tensor& begin, const Tensor& end, const Tensor& sums) {
  const JoinProblem problem{pieces.const_data_ptr<double>(), begin.const_data_ptr<int64_t>(),
                            end.const_data_ptr<int64_t>(),   sums.size(0),
                            sums.size(1),                    sums.mutable_data_ptr<double>()};
  const OnDevice on(pieces);
  check(join_pieces(problem, on.stream));
}

}  // namespace mcl
