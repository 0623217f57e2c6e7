// The order of rows by (group, id, place) and the columns that each row meets, of both sides.
//
// A row's place in the order is the number of rows before it: rows are sorted in tiles, and a row finds by bisection how
// many of each tile are before it. Of at most PLAN_TILE rows a side that is one launch, in which each block sorts the
// tile for itself; of more it is two, and the first one writes the sorted tiles.
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

__host__ __device__ __forceinline__ int tiles_of(int n) { return (n + PLAN_TILE - 1) / PLAN_TILE; }

// Of a side of which anything is wanted.
__host__ __device__ __forceinline__ int blocks_of(const PlanSide& side) {
  return side.order || side.begin ? (side.n + PLAN_THREADS - 1) / PLAN_THREADS : 0;
}

// Where a side's sorted tiles are kept between the two launches, 3 numbers for each row of both sides.
__device__ __forceinline__ int64_t* sorted_tile(const PlanProblem& problem, bool of_queries, int first) {
  return problem.sorted_tiles + 3 * (int64_t(of_queries ? 0 : problem.queries.n) + first);
}

// The first launch: a block owns a tile of one side.
__global__ void __launch_bounds__(PLAN_THREADS, 1) sort_tiles_kernel(const PlanProblem problem) {
  auto& tile = shared_memory<PlanMemory>();
  const int query_tiles = tiles_of(problem.queries.n);
  const bool of_queries = int(blockIdx.x) < query_tiles;
  const PlanSide side = of_queries ? problem.queries : problem.keys;
  const int first = (of_queries ? blockIdx.x : blockIdx.x - query_tiles) * PLAN_TILE;
  const int count = sort_tile(side, problem.negatives, first, tile);
  int64_t* to = sorted_tile(problem, of_queries, first);
  for (int at = threadIdx.x; at < count; at += PLAN_THREADS) {
    to[at] = tile.groups[at];
    to[count + at] = tile.ids[at];
    to[2 * count + at] = tile.places[at];
  }
}

// A tile into shared memory, sorted here or by the first launch; returns how many rows it has.
__device__ __forceinline__ int load_tile(const PlanProblem& problem, bool of_queries, int first, PlanMemory& tile) {
  const PlanSide side = of_queries ? problem.queries : problem.keys;
  if (!problem.sorted_tiles) return sort_tile(side, problem.negatives, first, tile);
  const int count = min(side.n - first, PLAN_TILE);
  const int64_t* from = sorted_tile(problem, of_queries, first);
  for (int at = threadIdx.x; at < count; at += PLAN_THREADS)
    tile.set(at, {from[at], from[count + at], int(from[2 * count + at])});
  __syncthreads();
  return count;
}

// A block owns PLAN_THREADS rows of one side, in the order of the data.
__global__ void __launch_bounds__(PLAN_THREADS, 1) plan_kernel(const PlanProblem problem) {
  auto& tile = shared_memory<PlanMemory>();
  const int query_blocks = blocks_of(problem.queries);
  const bool of_queries = int(blockIdx.x) < query_blocks;
  const bool meets_keys = of_queries && !problem.self;
  // Copies: of a reference to one or the other both would be in local memory.
  const PlanSide rows = of_queries ? problem.queries : problem.keys;
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
    const int count = load_tile(problem, of_queries, first, tile);
    if (valid) rank += first_where(0, count, [&](int at) { return !(tile.get(at) < mine); });
    if (rows.begin && problem.self) count_ranges(count);
    __syncthreads();
  }
  for (int first = 0; rows.begin && meets_keys && first < problem.keys.n; first += PLAN_TILE) {
    count_ranges(load_tile(problem, false, first, tile));
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
  if (problem.sorted_tiles) {
    const int tiles = tiles_of(problem.queries.n) + tiles_of(problem.keys.n);
    const cudaError_t error = launch<PlanMemory>(sort_tiles_kernel, tiles, PLAN_THREADS, problem, stream);
    if (error != cudaSuccess) return error;
  }
  return launch<PlanMemory>(plan_kernel, blocks, PLAN_THREADS, problem, stream);
}

}  // namespace mcl
