// Arguments of the kernels that plan the visiting order, in plain data.
#pragma once

#include <cstdint>

#include "../common.h"

namespace mcl {

// Queries or keys before they are sorted, and the requested results; null results are not computed.
struct PlanSide {
  const int64_t *labels, *ids;  // [n]; null: all rows have the same one
  int n;
  int64_t* order;        // [n]: the rows by (label, id), as far as labels matter; equal rows in their original order
  int64_t *begin, *end;  // [n], sorted: range of the other side's sorted rows whose labels match
};

struct PlanProblem {
  PlanSide queries, keys;
  bool self;  // the keys are the queries
  Negatives negatives;
  int64_t* sorted_tiles;  // workspace [3, n + m]; null: each block sorts all tiles, which suits one tile per side
};

// Finds the columns that each row drops because their value equals its own. Sorting makes them contiguous.
struct DropProblem {
  const int64_t *row_order, *row_begin, *row_end, *row_values;  // [n]; values in the original order
  const int64_t *column_order, *column_values;                  // [m]
  int n;
  int32_t *drop_begin, *drop_end;  // [n], sorted
};

}  // namespace mcl
