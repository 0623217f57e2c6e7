// The order of rows by (group, id, original index), and the range of columns of each row, for both sides in one launch.
//
// The position of a row is the number of rows that precede it: rows are sorted in tiles, and a row counts the preceding
// rows of each tile by bisection. With at most PLAN_TILE rows per side each block sorts the tile itself. With more,
// each tile is sorted once, and the blocks, which all have to be resident, wait for one another; on a device that
// cannot hold them, each block sorts all tiles.
#pragma once

#include <cooperative_groups.h>

#include "dropped.cuh"

namespace mcl {

constexpr int PLAN_THREADS = 512, PLAN_TILE = 2 * PLAN_THREADS;  // a thread sorts two rows at a time, and owns one

// The sort key of a row.
struct SortKey {
  int64_t group, id;
  int original;

  __device__ __forceinline__ bool operator<(const SortKey& other) const {
    if (group != other.group) return group < other.group;
    return id != other.id ? id < other.id : original < other.original;
  }
};

struct PlanMemory {
  int64_t groups[PLAN_TILE], ids[PLAN_TILE];
  int originals[PLAN_TILE];

  __device__ __forceinline__ SortKey get(int at) const { return {groups[at], ids[at], originals[at]}; }
  __device__ __forceinline__ void set(int at, const SortKey& key) {
    groups[at] = key.group;
    ids[at] = key.id;
    originals[at] = key.original;
  }
};

// The group is -1 for a negative label, else the label, or 0 if labels do not matter.
__device__ __forceinline__ SortKey sort_key(const PlanSide& side, Negatives negatives, int original) {
  int64_t group = side.labels ? max(side.labels[original], int64_t(-1)) : 0;
  if (negatives == Negatives::all) group = min(group, int64_t(0));
  return {group, side.ids ? side.ids[original] : 0, original};
}

// Loads at most PLAN_TILE rows from `first` on, and sorts them by a bitonic network. Returns their number.
__device__ __forceinline__ int sort_tile(const PlanSide& side, Negatives negatives, int first, PlanMemory& tile) {
  const int count = min(side.n - first, PLAN_TILE);
  int size = 2;
  while (size < count) size *= 2;
#pragma unroll 1  // here and below: unrolled, two blocks would not fit the registers
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

// Number of tiles of a side.
__host__ __device__ __forceinline__ int tile_count(int n) { return (n + PLAN_TILE - 1) / PLAN_TILE; }

// Number of parts of PLAN_THREADS rows; 0 for a side without requested results.
__host__ __device__ __forceinline__ int part_count(const PlanSide& side) {
  return side.order || side.begin ? (side.n + PLAN_THREADS - 1) / PLAN_THREADS : 0;
}

// Address of a sorted tile in the workspace, which has 3 integers for each row of both sides.
__device__ __forceinline__ int64_t* sorted_tile(const PlanProblem& problem, bool is_query, int first) {
  return problem.sorted_tiles + 3 * (int64_t(is_query ? 0 : problem.queries.n) + first);
}

// Sorts tile `index` of both sides, and writes it to the workspace.
__device__ __forceinline__ void write_sorted(const PlanProblem& problem, int index, PlanMemory& tile) {
  const int query_tiles = tile_count(problem.queries.n);
  const bool is_query = index < query_tiles;
  const PlanSide side = is_query ? problem.queries : problem.keys;
  const int first = (is_query ? index : index - query_tiles) * PLAN_TILE;
  const int count = sort_tile(side, problem.negatives, first, tile);
  int64_t* to = sorted_tile(problem, is_query, first);
  // No barrier follows: a thread reads the same rows here that it overwrites with the next tile.
#pragma unroll 1
  for (int at = threadIdx.x; at < count; at += PLAN_THREADS) {
    to[at] = tile.groups[at];
    to[count + at] = tile.ids[at];
    to[2 * count + at] = tile.originals[at];
  }
}

// Loads a tile into shared memory, sorted earlier or here. Returns its number of rows.
template <bool SORTED>
__device__ __forceinline__ int load_tile(const PlanProblem& problem, bool is_query, int first, PlanMemory& tile) {
  const PlanSide side = is_query ? problem.queries : problem.keys;
  if constexpr (!SORTED) return sort_tile(side, problem.negatives, first, tile);
  const int count = min(side.n - first, PLAN_TILE);
  const int64_t* from = sorted_tile(problem, is_query, first);
  for (int at = threadIdx.x; at < count; at += PLAN_THREADS)
    tile.set(at, {from[at], from[count + at], int(from[2 * count + at])});
  __syncthreads();
  return count;
}

// Plans part `index` of the rows of both sides: PLAN_THREADS rows of one side, in their original order.
template <bool SORTED>
__device__ __forceinline__ void plan_rows(const PlanProblem& problem, int index, PlanMemory& tile) {
  const int query_parts = part_count(problem.queries);
  const bool is_query = index < query_parts;
  // A copy: a reference to either side would place both in local memory.
  const PlanSide rows = is_query ? problem.queries : problem.keys;
  const int original = (is_query ? index : index - query_parts) * PLAN_THREADS + threadIdx.x;
  const bool valid = original < rows.n;
  const SortKey own_key = valid ? sort_key(rows, problem.negatives, original) : SortKey{0, 0, 0};
  // "different" and "all" match every column with a valid label, "same" the columns of the row's own group.
  const bool same = problem.negatives == Negatives::same;
  const int64_t first_group = same ? own_key.group : min(own_key.group, int64_t(0));
  const int64_t last_group = same ? own_key.group : INT64_MAX;

  int position = 0, begin = 0, end = 0;
  const int own_tiles = tile_count(rows.n), other_tiles = rows.begin && !problem.self ? tile_count(problem.keys.n) : 0;
  for (int at = 0; at < own_tiles + other_tiles; at++) {
    const bool own = at < own_tiles;
    const int count = load_tile<SORTED>(problem, own && is_query, (own ? at : at - own_tiles) * PLAN_TILE, tile);
    if (own) position += first_where(0, count, [&](int row) { return !(tile.get(row) < own_key); });
    if (rows.begin && own == problem.self) {
      begin += first_where(0, count, [&](int column) { return tile.groups[column] >= first_group; });
      end += first_where(0, count, [&](int column) { return tile.groups[column] > last_group; });
    }
    __syncthreads();
  }
  if (!valid) return;
  if (rows.order) rows.order[position] = original;
  if (rows.begin) {
    rows.begin[position] = begin;
    rows.end[position] = own_key.group < 0 ? begin : end;
  }
}

// SORTED: several tiles per side, which are sorted once before the blocks read them.
template <bool SORTED>
__global__ void __launch_bounds__(PLAN_THREADS, 2) plan_kernel(const PlanProblem problem) {
  auto& tile = shared_memory<PlanMemory>();
  if constexpr (SORTED) {
    const int tiles = tile_count(problem.queries.n) + tile_count(problem.keys.n);
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) write_sorted(problem, index, tile);
    cooperative_groups::this_grid().sync();
  }
  const int parts = part_count(problem.queries) + part_count(problem.keys);
  for (int index = blockIdx.x; index < parts; index += gridDim.x) plan_rows<SORTED>(problem, index, tile);
}

inline cudaError_t launch_plan(const PlanProblem& problem, cudaStream_t stream) {
  const int parts = part_count(problem.queries) + part_count(problem.keys);
  if (parts == 0) return cudaSuccess;
  if (!problem.sorted_tiles || !device_attribute(cudaDevAttrCooperativeLaunch))
    return launch<PlanMemory>(plan_kernel<false>, parts, PLAN_THREADS, problem, stream);
  const int blocks = std::max(parts, tile_count(problem.queries.n) + tile_count(problem.keys.n));
  return launch_resident<PlanMemory>(plan_kernel<true>, blocks, PLAN_THREADS, problem, stream);
}

}  // namespace mcl
