// Counts the units of each row tile, and writes the work list.
//
// One block does it: it reads 16 to 24 bytes a row.
#pragma once

#include "work_list.cuh"

namespace mcl {

constexpr int COUNT_THREADS = 512;

struct CountMemory {
  int units[COUNT_THREADS];
  int64_t warp_units[COUNT_THREADS / WARP];
};

// The least value of the warp's lanes.
__device__ __forceinline__ int warp_minimum(int value) {
#pragma unroll
  for (int lanes = 1; lanes < WARP; lanes *= 2) value = min(value, __shfl_xor_sync(0xffffffff, value, lanes));
  return value;
}

// A span, and the number of its column tiles.
struct CountedSpan {
  Span span;
  int tiles;
};

// Finds the span of a row tile, by the threads of a warp.
__device__ __forceinline__ CountedSpan find_span(const UnitProblem& problem, int row_tile) {
  constexpr int NONE = 0x7fffffff;
  const Rows& rows = problem.rows;
  const int edge = problem.edge;
  int first = NONE, minus_last = NONE, minus_drop_first = 0, drop_last = NONE;
  for (int row = threadIdx.x % WARP; row < edge; row += WARP) {
    const int64_t sorted = int64_t(row_tile) * edge + row;
    if (sorted >= rows.n) break;
    const int begin = int(rows.begin[sorted]), end = int(rows.end[sorted]);
    if (begin >= end) continue;
    first = min(first, begin);
    minus_last = min(minus_last, -end);
    if (!problem.skips_tiles) continue;
    minus_drop_first = min(minus_drop_first, -rows.drop_begin[sorted]);
    drop_last = min(drop_last, rows.drop_end[sorted]);
  }
  first = warp_minimum(first);
  const int last = -warp_minimum(minus_last);
  if (first >= last) return {{0, 0, NONE, NONE}, 0};
  const int tiles = (last - first + edge - 1) / edge;
  const CountedSpan without_hole{{first, last, NONE, NONE}, tiles};
  if (!problem.skips_tiles) return without_hole;
  const int drop_first = -warp_minimum(minus_drop_first);
  drop_last = warp_minimum(drop_last);
  if (drop_first >= drop_last) return without_hole;
  const int from = (drop_first - first + edge - 1) / edge;
  // The last tile counts as complete, although it may be ragged.
  const int to = drop_last < last ? (drop_last - first) / edge : tiles;
  if (from >= to) return without_hole;
  return {{first, last, first + from * edge, first + to * edge}, tiles - (to - from)};
}

__global__ void __launch_bounds__(COUNT_THREADS) count_units_kernel(const UnitProblem problem) {
  auto& shared = shared_memory<CountMemory>();
  const WorkList& work = problem.work;
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int64_t units = 0;
  for (int first = 0; first < work.row_tiles; first += COUNT_THREADS) {
    const int count = min(COUNT_THREADS, work.row_tiles - first);
    for (int at = warp; at < count; at += COUNT_THREADS / WARP) {
      const CountedSpan found = find_span(problem, first + at);
      if (lane > 0) continue;
      work.spans[first + at] = found.span;
      shared.units[at] = max(found.tiles, 1);
    }
    __syncthreads();
    // 512 row tiles of 2^26 column tiles fit an int64, not an int.
    int64_t until = int(threadIdx.x) < count ? shared.units[threadIdx.x] : 0;
#pragma unroll
    for (int lanes = 1; lanes < WARP; lanes *= 2) {
      const int64_t before = __shfl_up_sync(0xffffffff, until, lanes);
      if (lane >= lanes) until += before;
    }
    if (lane == WARP - 1) shared.warp_units[warp] = until;
    __syncthreads();
    int64_t all = 0;
#pragma unroll
    for (int other = 0; other < COUNT_THREADS / WARP; other++) {
      if (other < warp) until += shared.warp_units[other];
      all += shared.warp_units[other];
    }
    if (int(threadIdx.x) < count) work.tile_units[first + threadIdx.x + 1] = units + until;
    units += all;
  }
  if (threadIdx.x == 0) work.tile_units[0] = 0;
  __syncthreads();
  // With fewer units than programs, the last programs have none.
  const int64_t working = min(int64_t(work.programs), units);
  for (int64_t program = threadIdx.x; program <= work.programs; program += COUNT_THREADS) {
    // program * units / working, without its overflow
    const int64_t unit =
        program < working ? program * (units / working) + program * (units % working) / working : units;
    work.program_units[program] = unit;
    if (program < work.programs)
      work.program_tiles[program] =
          first_where(0, work.row_tiles, [&](int row_tile) { return work.tile_units[row_tile + 1] > unit; });
  }
}

// Carves the list out of one allocation, and writes it.
inline cudaError_t launch_count_units(UnitProblem& problem, const Allocate& allocate, cudaStream_t stream) {
  WorkList& work = problem.work;
  const int64_t units = int64_t(work.row_tiles) + 1 + work.programs + 1;
  work.tile_units = static_cast<int64_t*>(
      allocate(units * sizeof(int64_t) + work.row_tiles * sizeof(Span) + work.programs * sizeof(int)));
  work.program_units = work.tile_units + work.row_tiles + 1;
  work.spans = reinterpret_cast<Span*>(work.tile_units + units);
  work.program_tiles = reinterpret_cast<int*>(work.spans + work.row_tiles);
  return launch<CountMemory>(count_units_kernel, 1, COUNT_THREADS, problem, stream);
}

}  // namespace mcl
