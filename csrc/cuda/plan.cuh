// The order of rows by (group, id, place) and the columns that each row meets, of both sides.
//
// A row's place in the order is the number of rows before it: rows are sorted in tiles, and a row finds by bisection how
// many of each tile are before it. That is one launch. Of at most PLAN_TILE rows a side each block sorts the one tile
// for itself; of more each tile is sorted once, and the blocks, all of them resident, wait for one another: where a
// device does not hold them so, each sorts all tiles.
#pragma once

#include <cooperative_groups.h>

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
#pragma unroll 1  // here and below: unrolled, the registers of two blocks do not suffice
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

// Of PLAN_THREADS rows; none of a side of which nothing is wanted.
__host__ __device__ __forceinline__ int parts_of(const PlanSide& side) {
  return side.order || side.begin ? (side.n + PLAN_THREADS - 1) / PLAN_THREADS : 0;
}

// Where a side's sorted tiles are kept, 3 numbers for each row of both sides.
__device__ __forceinline__ int64_t* sorted_tile(const PlanProblem& problem, bool of_queries, int first) {
  return problem.sorted_tiles + 3 * (int64_t(of_queries ? 0 : problem.queries.n) + first);
}

// Tile `index` of both sides' to where it is kept.
__device__ __forceinline__ void write_sorted(const PlanProblem& problem, int index, PlanMemory& tile) {
  const int query_tiles = tiles_of(problem.queries.n);
  const bool of_queries = index < query_tiles;
  const PlanSide side = of_queries ? problem.queries : problem.keys;
  const int first = (of_queries ? index : index - query_tiles) * PLAN_TILE;
  const int count = sort_tile(side, problem.negatives, first, tile);
  int64_t* to = sorted_tile(problem, of_queries, first);
  // No barrier behind it: the rows that a thread reads here are loaded by itself of the next tile, too.
#pragma unroll 1
  for (int at = threadIdx.x; at < count; at += PLAN_THREADS) {
    to[at] = tile.groups[at];
    to[count + at] = tile.ids[at];
    to[2 * count + at] = tile.places[at];
  }
}

// A tile into shared memory, sorted before or here; returns how many rows it has.
template <bool SORTED>
__device__ __forceinline__ int load_tile(const PlanProblem& problem, bool of_queries, int first, PlanMemory& tile) {
  const PlanSide side = of_queries ? problem.queries : problem.keys;
  if constexpr (!SORTED) return sort_tile(side, problem.negatives, first, tile);
  const int count = min(side.n - first, PLAN_TILE);
  const int64_t* from = sorted_tile(problem, of_queries, first);
  for (int at = threadIdx.x; at < count; at += PLAN_THREADS)
    tile.set(at, {from[at], from[count + at], int(from[2 * count + at])});
  __syncthreads();
  return count;
}

// Part `index` of both sides' rows, PLAN_THREADS of one side in the order of the data.
template <bool SORTED>
__device__ __forceinline__ void plan_rows(const PlanProblem& problem, int index, PlanMemory& tile) {
  const int query_parts = parts_of(problem.queries);
  const bool of_queries = index < query_parts;
  // Copies: of a reference to one or the other both would be in local memory.
  const PlanSide rows = of_queries ? problem.queries : problem.keys;
  const int place = (of_queries ? index : index - query_parts) * PLAN_THREADS + threadIdx.x;
  const bool valid = place < rows.n;
  const SortKey mine = valid ? sort_key(rows, problem.negatives, place) : SortKey{0, 0, 0};
  // "different" and "all" meet every column with a valid label, "same" those of the row's own group.
  const bool same = problem.negatives == Negatives::same;
  const int64_t first_group = same ? mine.group : min(mine.group, int64_t(0)), last_group = same ? mine.group : INT64_MAX;

  int rank = 0, begin = 0, end = 0;
  const int own_tiles = tiles_of(rows.n), met_tiles = rows.begin && !problem.self ? tiles_of(problem.keys.n) : 0;
  for (int at = 0; at < own_tiles + met_tiles; at++) {
    const bool own = at < own_tiles;
    const int count = load_tile<SORTED>(problem, own && of_queries, (own ? at : at - own_tiles) * PLAN_TILE, tile);
    if (own) rank += first_where(0, count, [&](int row) { return !(tile.get(row) < mine); });
    if (rows.begin && own == problem.self) {
      begin += first_where(0, count, [&](int column) { return tile.groups[column] >= first_group; });
      end += first_where(0, count, [&](int column) { return tile.groups[column] > last_group; });
    }
    __syncthreads();
  }
  if (!valid) return;
  if (rows.order) rows.order[rank] = place;
  if (rows.begin) {
    rows.begin[rank] = begin;
    rows.end[rank] = mine.group < 0 ? begin : end;
  }
}

// SORTED: of several tiles a side, which are sorted once before the blocks read them.
template <bool SORTED>
__global__ void __launch_bounds__(PLAN_THREADS, 2) plan_kernel(const PlanProblem problem) {
  auto& tile = shared_memory<PlanMemory>();
  if constexpr (SORTED) {
    const int tiles = tiles_of(problem.queries.n) + tiles_of(problem.keys.n);
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) write_sorted(problem, index, tile);
    cooperative_groups::this_grid().sync();
  }
  const int parts = parts_of(problem.queries) + parts_of(problem.keys);
  for (int index = blockIdx.x; index < parts; index += gridDim.x) plan_rows<SORTED>(problem, index, tile);
}

inline cudaError_t launch_plan(const PlanProblem& problem, cudaStream_t stream) {
  const int parts = parts_of(problem.queries) + parts_of(problem.keys);
  if (parts == 0) return cudaSuccess;
  if (!problem.sorted_tiles || !device_attribute(cudaDevAttrCooperativeLaunch))
    return launch<PlanMemory>(plan_kernel<false>, parts, PLAN_THREADS, problem, stream);
  const int blocks = std::max(parts, tiles_of(problem.queries.n) + tiles_of(problem.keys.n));
  return launch_together<PlanMemory>(plan_kernel<true>, blocks, PLAN_THREADS, problem, stream);
}

}  // namespace mcl
