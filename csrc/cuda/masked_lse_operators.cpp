// Binds the kernels of masked_logsumexp to torch.
#include <ATen/ops/empty.h>

#include <vector>

#include "launch.h"
#include "operators.h"
#include "tensors.h"

namespace mcl {
namespace {

// The tensors of `Pairs`, kept alive during the launch.
struct PairTensors {
  const OptionalTensors &rows, &columns;
  const Tensor x, y, order, begin, end, column_order;
  bool skips_tiles;
  const Tensor& scale;

  PairTensors(const OptionalTensors& rows, const OptionalTensors& columns, bool skips_tiles, const Tensor& scale)
      : rows(rows),
        columns(columns),
        x(required(rows, 0)),
        y(required(columns, 0)),
        order(required(rows, 1)),
        begin(required(rows, 2)),
        end(required(rows, 3)),
        column_order(required(columns, 1)),
        skips_tiles(skips_tiles),
        scale(scale) {}

  bool half() const { return x.scalar_type() == y.scalar_type() && x.element_size() == 2; }

  template <class T>
  Pairs<T> pairs() const {
    const at::ScalarType operand = half() ? x.scalar_type() : scale.scalar_type();
    return {{matrix(x, operand), order.const_data_ptr<int64_t>(), checked_size(x), begin.const_data_ptr<int64_t>(),
             end.const_data_ptr<int64_t>(), pointer<int32_t>(rows.get(4)), pointer<int32_t>(rows.get(5)),
             pointer<int64_t>(rows.get(6))},
            {matrix(y, operand), column_order.const_data_ptr<int64_t>(), checked_size(y),
             pointer<int64_t>(columns.get(2))},
            x.size(1),
            half(),
            skips_tiles,
            scale.const_data_ptr<T>(),
            scale.dim()};
  }
};

// Memory that is released when the operator returns: only later launches of its stream can receive it.
struct Workspace {
  const Tensor& like;
  std::vector<Tensor> parts;

  void* allocate(int64_t bytes) {
    parts.push_back(at::empty({bytes}, like.options().dtype(at::kByte)));
    return parts.back().mutable_data_ptr();
  }
};

template <class T>
void forward(const PairTensors& tensors, const OptionalTensor& threshold, const Tensor& result, int64_t programs) {
  ForwardProblem<T> problem{tensors.pairs<T>(), nullptr, pointer<T>(threshold), nullptr};
  if (threshold)
    problem.count = result.mutable_data_ptr<int64_t>();
  else
    problem.lse = result.mutable_data_ptr<T>();
  const OnDevice on(tensors.x);
  Workspace workspace{tensors.x, {}};
  check(masked_lse_forward(problem, programs, [&](int64_t bytes) { return workspace.allocate(bytes); }, on.stream));
}

template <class T>
void backward(const PairTensors& tensors, const OptionalTensors& terms, const OptionalTensor& grad_x,
              const OptionalTensor& grad_scale, int64_t programs) {
  const auto term = [&](size_t index) { return pointer<T>(terms.get(index)); };
  const BackwardProblem<T> problem{tensors.pairs<T>(), term(0), term(1), term(2), term(3), term(4), term(5),
                                   grad_x ? grad_x->mutable_data_ptr() : nullptr, mutable_pointer<T>(grad_scale)};
  const OnDevice on(tensors.x);
  Workspace workspace{tensors.x, {}};
  check(masked_lse_backward(problem, programs, [&](int64_t bytes) { return workspace.allocate(bytes); }, on.stream));
}

}  // namespace

void masked_lse_forward(const OptionalTensors& rows, const OptionalTensors& columns, bool skips_tiles,
                        const Tensor& scale, const OptionalTensor& threshold, const Tensor& result, int64_t programs) {
  const PairTensors tensors(rows, columns, skips_tiles, scale);
  scale.scalar_type() == at::kDouble ? forward<double>(tensors, threshold, result, programs)
                                     : forward<float>(tensors, threshold, result, programs);
}

void masked_lse_backward(const OptionalTensors& rows, const OptionalTensors& columns, bool skips_tiles,
                         const Tensor& scale, const OptionalTensors& terms, const OptionalTensor& grad_x,
                         const OptionalTensor& grad_scale, int64_t programs) {
  const PairTensors tensors(rows, columns, skips_tiles, scale);
  scale.scalar_type() == at::kDouble ? backward<double>(tensors, terms, grad_x, grad_scale, programs)
                                     : backward<float>(tensors, terms, grad_x, grad_scale, programs);
}

}  // namespace mcl
