// The operators of the library; operators.cpp has their schemas. All launch on the current stream, without waiting.
#pragma once

#include "../common_torch.h"

namespace mcl {

// Computes the rows of one side, queries or keys, against the other side's, the columns:
//
//   rows     [x, order, begin, end, drop_begin, drop_end, ids]   as `Rows` of masked_lse_problem.h
//   columns  [y, order, ids]                                     as `Columns`
//   terms    [row_lse, row_weight, column_lse, column_weight, column_scale, fp16_scale]   as in `BackwardProblem`
//
// None stands for a pointer that is null there. Without a threshold `result` receives the LSE of each row, else int64
// counts. `programs` share the work, see work_list.cuh; 0: as many as the device holds at once.
void masked_lse_forward(const OptionalTensors& rows, const OptionalTensors& columns, bool skips_tiles,
                        const Tensor& scale, const OptionalTensor& threshold, const Tensor& result, int64_t programs);
void masked_lse_backward(const OptionalTensors& rows, const OptionalTensors& columns, bool skips_tiles,
                         const Tensor& scale, const OptionalTensors& terms, const OptionalTensor& grad_x,
                         const OptionalTensor& grad_scale, int64_t programs);

// `identities` is [labels, ids, key_labels, key_ids], int64 or None, of n queries and m keys; `like` is any tensor of
// their device. Results are as in plan_problem.h, and None if not requested.
void make_plan(const Tensor& like, const OptionalTensors& identities, int64_t n, int64_t m, bool self,
               int64_t negatives, const OptionalTensor& order, const OptionalTensor& begin, const OptionalTensor& end,
               const OptionalTensor& key_order, const OptionalTensor& sorted_tiles);

// `rows` is [order, begin, end, values], `columns` is [order, values].
void find_dropped(at::TensorList rows, at::TensorList columns, const Tensor& drop_begin, const Tensor& drop_end);

// `samples` is [x, offset, rounding, factor, step], of which the last three are as in `FixedPoint` of kmeans_problem.h;
// `inverse_norms` is given for cosine. `centers` is [centers, high, low, half_norms, limits] of `AssignProblem`, and
// `pieces` is [order, begin, end] of `PieceProblem`. The last two of `assign_clusters` are given if the centres are in
// several parts.
void assign_clusters(const OptionalTensors& samples, const OptionalTensor& inverse_norms, at::TensorList centers,
                     const Tensor& labels, const Tensor& distances, const Tensor& undecided,
                     const OptionalTensor& sums, const OptionalTensor& counts, const OptionalTensor& part_scores,
                     const OptionalTensor& part_labels);
void sum_pieces(const OptionalTensors& samples, const OptionalTensor& inverse_norms, at::TensorList pieces,
                const Tensor& sums);
void join_pieces(const Tensor& pieces, const Tensor& begin, const Tensor& end, const Tensor& sums);

}  // namespace mcl
