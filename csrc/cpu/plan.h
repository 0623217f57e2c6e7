// Which pairs are kept, in the order the kernels visit them, and the tasks that cover them.
//
//   keep_ij = match(y_i, y_j) and u_i != u_j        y: pseudo label, u: sample id
//
// Sorted by (label, id), the kept pairs of "same" are blocks on a diagonal, and the keys that a query does not keep
// for their id are neighbours. Nothing here depends on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "problem.h"

namespace mcl {

enum class Negatives { same, different, all };

// Labels and ids of one side, null where there are none.
struct Identity {
  int64_t size;
  const int64_t* labels;
  const int64_t* ids;
};

// Sorted queries that meet the same sorted keys.
struct Segment {
  int64_t query_begin, queries;
  int64_t key_begin, keys;
};

// The order by (label, id), negative labels first.
void sort_rows(const Identity& side, Negatives negatives, int64_t* order);

// For each sorted query the range of sorted keys it meets; empty for a negative label.
void find_key_ranges(const Identity& query, const int64_t* query_order, const Identity& key, const int64_t* key_order,
                     Negatives negatives, int64_t* key_begin, int64_t* key_end);

std::vector<Segment> find_segments(int64_t queries, const int64_t* key_begin, const int64_t* key_end);

// The keys within its segment that a query does not keep: a range of sorted keys, and where the order does not bring
// them together (ids shared across labels under "different") also those of its own code.
struct Dropped {
  std::vector<int64_t> begin, end;              // [N], sorted queries
  std::vector<int32_t> query_code, key_code;    // [N], [M], sorted; empty where the ranges say all
};

Dropped find_dropped(const Identity& query, const int64_t* query_order, const Identity& key, const int64_t* key_order,
                     Negatives negatives, const std::vector<Segment>& segments);

// Tasks that share a row or a column block run one after the other, in the order they stand here: that needs no locks,
// and every sum has one order whatever the number of threads.
struct Schedule {
  std::vector<Task> tasks;
  std::vector<bool> met_queries, met_keys;  // by any task; no keys in the self form
  int64_t most_rows = 0, most_columns = 0;  // of a task
  int64_t most_tasks = 0;                   // that may run at once
};

// Blocks are as large as leaves enough tasks that can run side by side: each task packs its rows and passes over their
// gradients once, so the larger, the less of that.
Schedule make_schedule(const std::vector<Segment>& segments, int64_t queries, int64_t keys, bool self,
                       int64_t enough_tasks);

}  // namespace mcl
