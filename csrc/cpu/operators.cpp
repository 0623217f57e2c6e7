// Schemas of namespace mcl_kernels_native. The operators are private to mcl_kernels, whose Python modules check the
// arguments.
#include "operators.h"

#include <torch/library.h>

#include "dispatch.h"

TORCH_LIBRARY(mcl_kernels_native, library) {
  library.def(
      "masked_lse_forward(Tensor?[] inputs, str negatives, bool bidirectional) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "masked_lse_backward(Tensor?[] inputs, Tensor[] saved, Tensor[] grads, str negatives, bool bidirectional, "
      "bool[3] needs_grad) -> (Tensor, Tensor, Tensor)");
  library.def("count_above(Tensor?[] inputs, Tensor threshold, str negatives) -> Tensor");
  library.def("unit_rows(Tensor view_a, Tensor? view_b) -> (Tensor, Tensor)");
  library.def(
      "unit_rows_backward(Tensor view_a, Tensor? view_b, Tensor grad_rows, Tensor grad_cosine) -> (Tensor, Tensor)");
  library.def("survey_rows(Tensor x, Tensor? middle) -> Tensor");
  library.def(
      "assign_clusters(Tensor x, Tensor[] centers, bool cosine, bool with_sums, Tensor(a!)? followed, "
      "Tensor(b!)? upper, Tensor(c!)? lower, Tensor? order, Tensor? shifts, Tensor? weights) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  library.def("code_rows(Tensor x, Tensor offset, Tensor? positions=None) -> (Tensor, Tensor)");
  library.def(
      "add_center(Tensor x, Tensor offset, Tensor[] codes, Tensor candidates, Tensor centers, Tensor(a!) nearest, "
      "Tensor(b!) labels, int compared, Tensor? weights=None, Tensor? positions=None) -> (int, int)");
  library.def("instruction_set() -> str", &mcl::instruction_set);
}

TORCH_LIBRARY_IMPL(mcl_kernels_native, CPU, library) {
  library.impl("masked_lse_forward", &mcl::masked_lse_forward);
  library.impl("masked_lse_backward", &mcl::masked_lse_backward);
  library.impl("count_above", &mcl::count_above);
  library.impl("unit_rows", &mcl::unit_rows);
  library.impl("unit_rows_backward", &mcl::unit_rows_backward);
  library.impl("survey_rows", &mcl::survey_rows);
  library.impl("assign_clusters", &mcl::assign_clusters);
  library.impl("code_rows", &mcl::code_rows);
  library.impl("add_center", &mcl::add_center);
}
