// The tasks of masked_logsumexp: blocks of sorted queries against blocks of sorted keys that cover all kept pairs.
// Nothing here depends on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "masked_lse_problem.h"
#include "plan.h"

namespace mcl {

// Tasks that share a row block or a column block run one after the other, in the order of this list: no locks, and
// every sum has one order for any number of threads.
struct Schedule {
  std::vector<Task> tasks;
  std::vector<bool> visited_queries, visited_keys;  // by any task; no keys in the self form
  int64_t max_rows = 0, max_columns = 0;            // of a task
  int64_t max_concurrent = 0;                       // number of tasks that may run at once
};

// Blocks are the largest that leave `enough_tasks` tasks able to run side by side, since each task packs its rows and
// passes over their gradients once.
Schedule make_schedule(const std::vector<Segment>& segments, int64_t queries, int64_t keys, bool self,
                       int64_t enough_tasks);

}  // namespace mcl
