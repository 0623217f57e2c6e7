// The functions of one instruction set.
#pragma once

#include "kmeans_problem.h"
#include "masked_lse_problem.h"
#include "normalize_problem.h"

namespace mcl {

template <class T>
struct Kernels {
  // masked_logsumexp
  TaskFunction<T> forward, backward, count;
  int64_t (*workspace_bytes)(int64_t width, int64_t rows, int64_t columns);

  // Normalisation of rows
  void (*unit_rows)(const Views<T>& views, int64_t begin, int64_t end, T* unit_a, T* unit_b, T* cosine);
  void (*unit_rows_backward)(const Views<T>& views, int64_t begin, int64_t end, const T* grad_unit_a,
                             const T* grad_unit_b, const T* grad_cosine, T* grad_a, T* grad_b);

  // k-means
  void (*survey_rows)(const Matrix& x, const T* middle, int64_t width, int64_t begin, int64_t end, T* found, T* copies);
  int64_t (*packed_centers_bytes)(int64_t width, int64_t centers);
  void (*pack_centers)(const Clusters<T>& clusters, const T* centers, const T* offset, char* memory);
  int64_t (*cluster_workspace_bytes)(int64_t width);
  void (*cluster_rows)(const Clusters<T>& clusters, char* packed_centers, int64_t begin, int64_t end, double* sums,
                       int64_t* counts, char* workspace);

  // k-means++
  void (*code_rows)(const SampledRows<T>& rows, const T* offset, int64_t width, int64_t code_stride, int64_t begin,
                    int64_t end, int8_t* codes, RowCode<T>* constants);
  int64_t (*seeding_stride)(int64_t width);
  void (*begin_seeding_step)(const Seeding<T>& seeding, const int64_t* candidate_rows, const int64_t* center_rows);
  SeedingCounts (*compare_with_candidates)(const Seeding<T>& seeding, int64_t begin, int64_t end, int64_t* nearer,
                                           double* distances, double* gains);
};

}  // namespace mcl
