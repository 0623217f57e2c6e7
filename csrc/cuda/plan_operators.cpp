// Binds the kernels that plan the visiting order to torch.
#include "launch.h"
#include "operators.h"
#include "tensors.h"

namespace mcl {

void make_plan(const Tensor& like, const OptionalTensors& identities, int64_t n, int64_t m, bool self,
               int64_t negatives, const OptionalTensor& order, const OptionalTensor& begin, const OptionalTensor& end,
               const OptionalTensor& key_order, const OptionalTensor& sorted_tiles) {
  const auto identity = [&](size_t index) { return pointer<int64_t>(identities.get(index)); };
  const PlanSide queries{identity(0),
                         identity(1),
                         int(n),
                         mutable_pointer<int64_t>(order),
                         mutable_pointer<int64_t>(begin),
                         mutable_pointer<int64_t>(end)};
  const PlanSide keys{identity(2), identity(3), int(m), mutable_pointer<int64_t>(key_order), nullptr, nullptr};
  const PlanProblem problem{queries, keys, self, Negatives(negatives), mutable_pointer<int64_t>(sorted_tiles)};
  const OnDevice on(like);
  check(make_plan(problem, on.stream));
}

void find_dropped(at::TensorList rows, at::TensorList columns, const Tensor& drop_begin, const Tensor& drop_end) {
  const DropProblem problem{rows[0].const_data_ptr<int64_t>(),
                            rows[1].const_data_ptr<int64_t>(),
                            rows[2].const_data_ptr<int64_t>(),
                            rows[3].const_data_ptr<int64_t>(),
                            columns[0].const_data_ptr<int64_t>(),
                            columns[1].const_data_ptr<int64_t>(),
                            checked_size(rows[0]),
                            drop_begin.mutable_data_ptr<int32_t>(),
                            drop_end.mutable_data_ptr<int32_t>()};
  const OnDevice on(rows[0]);
  check(find_dropped(problem, on.stream));
}

}  // namespace mcl
