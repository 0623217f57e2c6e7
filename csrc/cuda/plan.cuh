// The order of rows by (group, id, place) and the columns that each row meets, of both sides in one launch.
//
// A row's place in the order is the number of rows before it. Each block walks all rows in tiles, sorts a tile in
// shared memory and finds by bisection how many of it are before each row of its own: blocks need nothing of one
// another, at the price of n^2 / PLAN_TILE steps of sorting in all, which for tens of thousands of rows is less than
// the launches of a sort.
#pragma once

#include "dropped.cuh"

namespace mcl {

constexpr int PLAN_THREADS = 512, PLAN_TILE = 2 * PLAN_THREADS;  // a thread orders two rows at a time, and owns one

// What rows are sorted by.
struct SortKey {
  int64_t group, id;
  int place;

  __device__ __forceinline__ bool operator<(const SortKey& other) const {
    if (group != other.group) return group < other.group;
    return id != other.id ? id < other.id : place < other.place;
  }
};

struct PlanMemory {
  int64_t groups[PLAN_TILE], ids[PLAN_TILE];
  int places[PLAN_TILE];

  __device__ __forceinline__ SortKey get(int at) const { return {groups[at], ids[at], places[at]}; }
  __device__ __forceinline__ void set(int at, const SortKey& key) {
    groups[at] = key.group;
    ids[at] = key.id;
    places[at] = key.place;
  }
};

// -1 where nothing matches, then the label where it matters.
__device__ __forceinline__ SortKey sort_key(const PlanSide& side, Negatives negatives, int place) {
  int64_t group = side.labels ? max(side.labels[place], int64_t(-1)) : 0;
  if (negatives == Negatives::all) group = min(group, int64_t(0));
  return {group, side.ids ? side.ids[place] : 0, place};
}

// Loads the rows from `first` on, at most PLAN_TILE, and sorts them by a bitonic network; returns how many they are.
__device__ __forceinline__ int sort_tile(const PlanSide& side, Negatives negatives, int first, PlanMemory& tile) {
  const int count = min(side.n - first, PLAN_TILE);
  int size = 2;
  while (size < count) size *= 2;
  for (int at = threadIdx.x; at < size; at += PLAN_THREADS)
    tile.set(at, at < count ? sort_key(side, negatives, first + at) : SortKey{INT64_MAX, INT64_MAX, INT32_MAX});
  __syncthreads();
  for (int width = 2; width <= size; width *= 2)
    for (int step = width / 2; step > 0; step /= 2) {
      if (threadIdx.x < size / 2) {
        const int lower = 2 * threadIdx.x - (threadIdx.x & (step - 1)), upper = lower + step;
        const SortKey a = tile.get(lower), b = tile.get(upper);
        if ((b < a) == ((lower & width) == 0)) {
          tile.set(lower, b);
          tile.set(upper, a);
        }
      }
      __syncthreads();
    }
  return count;
}

// Of a side of which anything is wanted.
__host__ __device__ __forceinline__ int blocks_of(const PlanSide& side) {
  return side.order || side.begin ? (side.n + PLAN_THREADS - 1) / PLAN_THREADS : 0;
}

// A block owns PLAN_THREADS rows of one side, in the order of the data.
__global__ void __launch_bounds__(PLAN_THREADS, 1) plan_kernel(const PlanProblem problem) {
  auto& tile = shared_memory<PlanMemory>();
  const int query_blocks = blocks_of(problem.queries);
  const bool of_queries = int(blockIdx.x) < query_blocks;
  // Copies: of a reference to one or the other both would be in local memory.
  const PlanSide rows = of_queries ? problem.queries : problem.keys;
  const PlanSide columns = of_queries && !problem.self ? problem.keys : problem.queries;
  const int place = (of_queries ? blockIdx.x : blockIdx.x - query_blocks) * PLAN_THREADS + threadIdx.x;
  const bool valid = place < rows.n;
  const SortKey mine = valid ? sort_key(rows, problem.negatives, place) : SortKey{0, 0, 0};
  // "different" and "all" meet every column with a valid label, "same" those of the row's own group.
  const bool same = problem.negatives == Negatives::same;
  const int64_t first_group = same ? mine.group : min(mine.group, int64_t(0)), last_group = same ? mine.group : INT64_MAX;

  int64_t rank = 0, begin = 0, end = 0;
  const auto count_ranges = [&](int count) {
    begin += first_where(0, count, [&](int at) { return tile.groups[at] >= first_group; });
    end += first_where(0, count, [&](int at) { return tile.groups[at] > last_group; });
  };
  for (int first = 0; first < rows.n; first += PLAN_TILE) {
    const int count = sort_tile(rows, problem.negatives, first, tile);
    if (valid) rank += first_where(0, count, [&](int at) { return !(tile.get(at) < mine); });
    if (rows.begin && problem.self) count_ranges(count);
    __syncthreads();
  }
  for (int first = 0; rows.begin && !problem.self && first < columns.n; first += PLAN_TILE) {
    count_ranges(sort_tile(columns, problem.negatives, first, tile));
    __syncthreads();
  }
  if (!valid) return;
  if (rows.order) rows.order[rank] = place;
  if (rows.begin) {
    rows.begin[rank] = begin;
    rows.end[rank] = mine.group < 0 ? begin : end;
  }
}

inline cudaError_t launch_plan(const PlanProblem& problem, cudaStream_t stream) {
  const int blocks = blocks_of(problem.queries) + blocks_of(problem.keys);
  if (blocks == 0) return cudaSuccess;
  return launch<PlanMemory>(plan_kernel, blocks, PLAN_THREADS, problem, stream);
}

}  // namespace mcl
