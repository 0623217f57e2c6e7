// The operators of the library; operators.cpp has their schemas.
#pragma once

#include <array>
#include <string>
#include <tuple>

#include "../common_torch.h"

namespace mcl {

// `inputs` is [query, key, scale, labels, key_labels, ids, key_ids]: query [N, D]; key [M, D] or None, the self form;
// scale, a scalar or [N]; int64 labels and ids, None if not given.

// Returns row_lse, column_lse, query_order, key_order, key_begin and key_end.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> masked_lse_forward(const OptionalTensors& inputs,
                                                                              const std::string& negatives,
                                                                              bool bidirectional);

// `saved`: the results of masked_lse_forward. `grads`: gradients of row_lse and column_lse. `needs_grad` and the
// results are for query, key and scale; a gradient that is not needed is [0].
std::tuple<Tensor, Tensor, Tensor> masked_lse_backward(const OptionalTensors& inputs, at::TensorList saved,
                                                       at::TensorList grads, const std::string& negatives,
                                                       bool bidirectional, std::array<bool, 3> needs_grad);

// For each query the number of kept keys with not (<q_i, k_j> <= threshold_i). The scale of `inputs` is not read.
Tensor count_above(const OptionalTensors& inputs, const Tensor& threshold, const std::string& negatives);

// Rows divided by their norms, of view_a and then of view_b if given, and the cosines of both views.
std::tuple<Tensor, Tensor> unit_rows(const Tensor& view_a, const OptionalTensor& view_b);
std::tuple<Tensor, Tensor> unit_rows_backward(const Tensor& view_a, const OptionalTensor& view_b,
                                              const Tensor& grad_rows, const Tensor& grad_cosine);

// The smallest and the largest entry of each column, NaN for one that holds NaN, and its smallest nonzero distance to
// `middle`, [D], infinite where that is NaN: [3, D] in the dtype of products.
Tensor survey_rows(const Tensor& x, const OptionalTensor& middle);

// One pass of k-means. `centers` is [centers, offset, rounding]. Returns labels, distances, sums and counts: the sums,
// [levels K, D], of each level and centre are relative to the offset. `followed`: labels of an earlier pass, which are
// overwritten by those of this pass. Then sums and counts are the changes, and no labels are returned.
//
// `upper`, fp32 [N], and `lower`, fp32 [N, groups], for followed labels: bounds of the distance to the centre of the
// label and to the other centres of each group, which are overwritten too. `order`, int32 [K]: the centres in the order
// of the groups. `shifts`, fp32 [K]: bounds of the distances that the centres moved since the pass that set the bounds.
// With it rows that keep their label, as the bounds prove, are not read, and their distance is NaN; without sums the
// distances of all rows are found.
//
// `weights`, fp64 [N]: rows are summed times their weights, in sums [levels K, D + 1] whose last column is the sum of
// the weights, and whose rounding has that column too. Rows of weight 0 are not counted.
std::tuple<Tensor, Tensor, Tensor, Tensor> assign_clusters(const Tensor& x, at::TensorList centers, bool cosine,
                                                           bool with_sums, const OptionalTensor& followed,
                                                           const OptionalTensor& upper, const OptionalTensor& lower,
                                                           const OptionalTensor& order, const OptionalTensor& shifts,
                                                           const OptionalTensor& weights);

// Rows relative to the offset as int8 codes, [N, D rounded up], and the constants of each code, [N, 3]. With
// `positions`, int64 [N], the rows are those of x there; in add_center too.
std::tuple<Tensor, Tensor> code_rows(const Tensor& x, const Tensor& offset, const OptionalTensor& positions);

// One step of greedy k-means++. `codes` is empty or the result of code_rows; `candidates` [L] and `centers` [K] are
// indices of rows. Finds the candidate that as centre K lowers the sum of the nearest distances most, and updates
// `nearest`, fp64 [N], and `labels`, int32 [N]. Returns the position of the candidate, and the number of rows that were
// compared. `compared` is that of the step before: the number of threads follows from it. `weights`, fp64 [N]: of the
// rows in the sum.
std::tuple<int64_t, int64_t> add_center(const Tensor& x, const Tensor& offset, at::TensorList codes,
                                        const Tensor& candidates, const Tensor& centers, const Tensor& nearest,
                                        const Tensor& labels, int64_t compared, const OptionalTensor& weights,
                                        const OptionalTensor& positions);

}  // namespace mcl
