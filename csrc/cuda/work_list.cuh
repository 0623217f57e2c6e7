// How blocks share the products of all row tiles: in equal parts, whatever the labels are.
//
// A unit is a row tile against one of the column tiles of its span; a row tile without columns has one unit, too. The
// W units are numbered by row tile, and program g of G does units g W / G .. (g + 1) W / G - 1. G depends on the sizes
// and the device alone; W is read on the device, so nothing waits for it. A row tile within one program is finished by
// it. Of any other, each program writes its part to a slot of a workspace, slot 2 g for the program's first row tile
// and 2 g + 1 for its last, and a second kernel adds the parts in a fixed order.
#pragma once

#include "launch.h"
#include "tiles.cuh"

namespace mcl {

constexpr int JOIN_THREADS = 128;
constexpr int64_t MAX_PARTIALS = int64_t(64) << 20;  // bytes of a workspace for parts of row tiles
constexpr int64_t MAX_PROGRAMS = 1 << 15;

// Consecutive units of a program within one row tile: column tiles from `first` on, without the hole.
struct Stretch {
  int row_tile;
  int slot;  // of the workspace; -1 if these are all units of the row tile
  int first, last, hole_begin, hole_end;

  // First column of the next tile to compute: `start`, or the end of the hole if the hole starts there.
  __device__ __forceinline__ int tile_at(int start) const { return start == hole_begin ? hole_end : start; }
};

// The units of a program, from stretch to stretch. What can be read again is not kept: registers are scarce.
template <int EDGE>
class Program {
 public:
  __device__ __forceinline__ Program(const WorkList& work, int index)
      : work_(work), row_tile_(work.program_tiles[index]), slot_(2 * index) {}

  // Moves to the next stretch. Returns false after the last one.
  __device__ __forceinline__ bool next(Stretch& stretch) {
    const int index = slot_ / 2;
    const int64_t begin = work_.tile_units[row_tile_], stop = work_.program_units[index + 1];
    const int64_t unit = max(begin, work_.program_units[index]);
    if (unit >= stop) return false;
    const int64_t end = work_.tile_units[row_tile_ + 1], past = min(end, stop);
    const bool complete = unit == begin && past == end;
    const Span span = work_.spans[row_tile_];
    const auto start_of = [&](int64_t other) {
      const int column = span.first + int(other - begin) * EDGE;
      return column < span.hole_begin ? column : column + span.hole_end - span.hole_begin;
    };
    const int last = past == end ? span.last : start_of(past - 1) + EDGE;
    stretch = {row_tile_, complete ? -1 : slot_, start_of(unit), last, span.hole_begin, span.hole_end};
    row_tile_++;
    slot_ |= 1;
    return true;
  }

 private:
  const WorkList& work_;
  int row_tile_, slot_;
};

// The slots of a row tile that several programs share: first_slot, then 2 p for the programs p = second .. past - 1.
struct Cut {
  int row_tile, first_slot, second, past;
};

// Finds the row tile whose second program is `second`. Returns false if there is none.
__device__ __forceinline__ bool find_cut(const WorkList& work, int second, Cut& cut) {
  const int row_tile = work.program_tiles[second];
  const int64_t begin = work.tile_units[row_tile];
  const int64_t before = work.program_units[second - 1];
  if (work.program_units[second] == begin || before > begin) return false;
  const int64_t end = work.tile_units[row_tile + 1];
  cut = {row_tile, 2 * (second - 1) + (before < begin), second,
         first_where(second + 1, work.programs, [&](int program) { return work.program_units[program] >= end; })};
  return true;
}

// Fills the work list of a kernel whose row tiles have EDGE rows. `requested`: the number of programs, of `parts`
// blocks each; 0 for as many as the device holds at once. There are at most as many as units are possible, and as
// MAX_PARTIALS holds the slots of.
template <class Shared, int EDGE, class Problem>
cudaError_t list_work(void (*kernel)(Problem), Problem& problem, int threads, int64_t parts, int64_t slot_bytes,
                      int64_t requested, const Allocate& allocate, cudaStream_t stream) {
  const auto& pairs = problem.pairs;
  const auto tiles_of = [](int size) { return (int64_t(size) + EDGE - 1) / EDGE; };
  int64_t programs = requested;
  if (requested == 0) {
    const cudaError_t error = find_resident<Shared>(kernel, threads, &programs);
    if (error != cudaSuccess) return error;
    programs /= parts;
  }
  const int64_t row_tiles = tiles_of(pairs.rows.n), column_tiles = tiles_of(pairs.columns.m);
  const int64_t max_units = row_tiles * std::max<int64_t>(column_tiles, 1);
  programs = std::min({programs, max_units, MAX_PARTIALS / (2 * slot_bytes), MAX_PROGRAMS});
  UnitProblem units{pairs.rows, EDGE, pairs.skips_tiles, {int(row_tiles), int(std::max<int64_t>(programs, 1))}};
  const cudaError_t error = count_units(units, allocate, stream);
  problem.work = units.work;
  return error;
}

}  // namespace mcl
