// The tasks of a schedule on the threads that the caller provides.
#pragma once

#include <atomic>
#include <functional>

#include "plan.h"

namespace mcl {

// work(thread) for each thread 0 .. threads - 1, on as many threads as there really are: possibly one after the other.
using Parallel = std::function<void(int64_t threads, const std::function<void(int64_t thread)>& work)>;

// A round is one parallel region, and threads take the next task as they get free. There is no barrier inside a
// region, so a region that runs serially (in a worker process, in a nested region) finishes too.
template <class T>
void run_tasks(const Schedule& schedule, TaskFunction<T> function, const Problem<T>& problem, int64_t threads,
               char* workspace, int64_t workspace_bytes, const Parallel& parallel) {
  for (size_t round = 0; round + 1 < schedule.rounds.size(); round++) {
    std::atomic<int64_t> next{schedule.rounds[round]};
    const int64_t end = schedule.rounds[round + 1];
    const auto work = [&](int64_t thread) {
      for (int64_t task = next++; task < end; task = next++)
        function(problem, schedule.tasks[task], workspace + thread * workspace_bytes);
    };
    if (threads == 1 || end - next == 1)
      work(0);
    else
      parallel(threads, work);
  }
}

}  // namespace mcl
