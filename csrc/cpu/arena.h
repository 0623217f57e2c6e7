// The working memory of a task, handed out piece by piece.
#pragma once

#include "vector.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace mcl::MCL_INSTRUCTION_SET {

// Columns and rows of a tile: a multiple of a panel, a group and a matrix register of every type.
constexpr int64_t TILE = 192;

class Arena {
 public:
  explicit Arena(char* memory) : begin_(reinterpret_cast<uintptr_t>(memory)), next_(begin_) {}

  template <class P>
  P* take(int64_t count) {
    const uintptr_t start = next_;
    next_ += round_up(count * sizeof(P), 64);
    mark(start, count * sizeof(P));
    return reinterpret_cast<P*>(start);
  }

  int64_t bytes() const { return next_ - begin_; }

 private:
  uintptr_t begin_, next_;

  // AddressSanitizer sees one allocation. A poisoned gap after each piece lets it detect writes past the piece.
  void mark([[maybe_unused]] uintptr_t start, [[maybe_unused]] int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    next_ += 8192;            // the gap, some rows long
    if (begin_ == 0) return;  // no memory: the caller measures its size
    __asan_unpoison_memory_region(reinterpret_cast<void*>(start), bytes);
    __asan_poison_memory_region(reinterpret_cast<void*>(start + bytes), next_ - start - bytes);
#endif
  }
};

// A rectangle of a task, at most TILE by TILE.
struct Tile {
  int64_t row, rows;
  int64_t column, columns;
  bool triangle;  // on the diagonal of the task: only column > row counts
  bool complete;  // every pair is kept
};

// The products of a tile, later its logits or weights: row i at i * TILE_STRIDE.
template <class T>
constexpr int64_t TILE_STRIDE = TILE + LANES<T>;

template <class T>
int64_t padded_width(int64_t width) {
  // One extra vector: rows a power of two apart would compete for few sets of the cache.
  return round_up(width, LANES<T>) + LANES<T>;
}

}  // namespace mcl::MCL_INSTRUCTION_SET
