// The visiting order of masked_logsumexp: which pairs are kept, and where they lie once both sides are sorted.
//
//   keep_ij = match(y_i, y_j) and u_i != u_j        y: pseudo label, u: sample id
//
// Sorted by (label, id), the kept pairs of "same" are blocks on a diagonal, and the keys that a query drops for their
// id are contiguous.
#pragma once

#include <cstdint>
#include <vector>

#include "../common.h"

namespace mcl {

// Labels and ids of one side, null if not given.
struct Identity {
  int64_t size;
  const int64_t* labels;
  const int64_t* ids;
};

// Sorted queries that are compared with the same sorted keys.
struct Segment {
  int64_t query_begin, queries;
  int64_t key_begin, keys;
};

// The order by (label, id), negative labels first.
void sort_rows(const Identity& side, Negatives negatives, int64_t* order);

// For each sorted query the range of sorted keys whose labels match; empty for a negative label.
void find_key_ranges(const Identity& query, const int64_t* query_order, const Identity& key, const int64_t* key_order,
                     Negatives negatives, int64_t* key_begin, int64_t* key_end);

std::vector<Segment> find_segments(int64_t queries, const int64_t* key_begin, const int64_t* key_end);

// The keys within its segment that a query drops: a range of sorted keys, and the keys of the query's own code. Codes
// are needed only for ids shared across labels under "different", which sorting does not make contiguous.
struct Dropped {
  std::vector<int64_t> begin, end;            // [N], sorted queries
  std::vector<int32_t> query_code, key_code;  // [N], [M], sorted; empty if the ranges are complete
};

Dropped find_dropped(const Identity& query, const int64_t* query_order, const Identity& key, const int64_t* key_order,
                     Negatives negatives, const std::vector<Segment>& segments);

}  // namespace mcl
