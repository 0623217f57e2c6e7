// Runs the tasks of a schedule on the threads that the caller provides.
#pragma once

#include <atomic>
#include <functional>
#include <vector>

#include "schedule.h"

namespace mcl {

// Calls work(thread) for each thread 0 .. threads - 1, on as many system threads as it has: possibly one after the
// other.
using Parallel = std::function<void(int64_t threads, const std::function<void(int64_t thread)>& work)>;

// A free thread takes the next task, and waits for the earlier tasks that share a block with it. Those were taken
// before, so one of them can always proceed, and a region that runs serially (in a worker process, in a nested region)
// never waits.
template <class T>
void run_tasks(const Schedule& schedule, TaskFunction<T> function, const Problem<T>& problem, int64_t threads,
               char* workspace, int64_t workspace_bytes, const Parallel& parallel) {
  const int64_t size = schedule.tasks.size();
  std::atomic<int64_t> next{0};
  std::vector<std::atomic<bool>> done(size);
  const auto wait_for = [&](int64_t task) {
    if (task != NO_TASK) done[task].wait(false, std::memory_order_acquire);
  };
  parallel(threads, [&](int64_t thread) {
    for (int64_t index = next++; index < size; index = next++) {
      const Task& task = schedule.tasks[index];
      wait_for(task.previous_of_rows);
      wait_for(task.previous_of_columns);
      function(problem, task, workspace + thread * workspace_bytes);
      done[index].store(true, std::memory_order_release);
      done[index].notify_all();
    }
  });
}

}  // namespace mcl
