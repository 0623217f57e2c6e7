// Schemas of namespace MCL_NAMESPACE. The operators are private to mcl_kernels, whose Python modules check the
// arguments, allocate the results and choose the launches of a pass.
#include "operators.h"

#include <torch/library.h>

#include <string>

// TORCH_LIBRARY of torch 2.6 does not expand its argument, so this macro expands it first.
#define LIBRARY_OF(name, library) TORCH_LIBRARY(name, library)
// A definition on the compiler's command line has no quotes, since not every shell would pass them on.
#define TEXT_OF(...) #__VA_ARGS__
#define EXPANDED_TEXT_OF(...) TEXT_OF(__VA_ARGS__)

// Defined for every device: tests run the same operators on the CPU, where only launches differ.
LIBRARY_OF(MCL_NAMESPACE, library) {
  library.def(
      "masked_lse_forward(Tensor?[] rows, Tensor?[] columns, bool skips_tiles, Tensor scale, Tensor? threshold, "
      "Tensor(a!) result, int programs) -> ()",
      &mcl::masked_lse_forward);
  library.def(
      "masked_lse_backward(Tensor?[] rows, Tensor?[] columns, bool skips_tiles, Tensor scale, Tensor?[] terms, "
      "Tensor(a!)? grad_x, Tensor(b!)? grad_scale, int programs) -> ()",
      &mcl::masked_lse_backward);
  library.def(
      "make_plan(Tensor like, Tensor?[] identities, int n, int m, bool self, int negatives, Tensor(a!)? order, "
      "Tensor(b!)? begin, Tensor(c!)? end, Tensor(d!)? key_order, Tensor(e!)? sorted_tiles) -> ()",
      &mcl::make_plan);
  library.def(
      "find_dropped(Tensor[] rows, Tensor[] columns, Tensor(a!) drop_begin, Tensor(b!) drop_end) -> ()",
      &mcl::find_dropped);
  library.def(
      "assign_clusters(Tensor?[] samples, Tensor(a!)? inverse_norms, Tensor[] centers, Tensor(b!) labels, "
      "Tensor(c!) distances, Tensor(d!) undecided, Tensor(e!)? sums, Tensor(f!)? counts, Tensor(g!)? part_scores, "
      "Tensor(h!)? part_labels) -> ()",
      &mcl::assign_clusters);
  library.def(
      "sum_pieces(Tensor?[] samples, Tensor? inverse_norms, Tensor[] pieces, Tensor(a!) sums) -> ()",
      &mcl::sum_pieces);
  library.def("join_pieces(Tensor pieces, Tensor begin, Tensor end, Tensor(a!) sums) -> ()", &mcl::join_pieces);
  // Returns the compute capabilities, as in TORCH_CUDA_ARCH_LIST but separated by commas.
  library.def("architectures() -> str", [] { return std::string(EXPANDED_TEXT_OF(MCL_ARCHITECTURES)); });
}
