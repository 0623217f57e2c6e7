// The columns of a tile that a row keeps.
#pragma once

#include "vector.h"

namespace mcl::MCL_INSTRUCTION_SET {

// The kept columns of one row; all positions are relative to the tile.
template <class T>
struct KeptColumns {
  int64_t start;                 // the first column of the row, a multiple of LANES
  int64_t columns;               // number of columns of the tile
  int64_t drop_begin, drop_end;  // range of dropped columns
  const int32_t* codes;          // of the columns; null: only the range is dropped
  int32_t code;                  // of the row

  Mask<T> keep(int64_t j) const {
    using Lane = decltype(+Mask<T>{}[0]);
    Mask<T> lane;
    for (int64_t l = 0; l < LANES<T>; l++) lane[l] = Lane(j + l);
    Mask<T> kept = ((lane < Lane(drop_begin)) | (lane >= Lane(drop_end))) & (lane < Lane(columns));
    if (codes)
      for (int64_t l = 0; l < LANES<T>; l++) kept[l] &= -(j + l < columns && codes[j + l] != code);
    return kept;
  }

  // Calls body(j, kept) for each vector of columns that may hold a kept pair; kept is `Everything` if no lane is
  // dropped.
  struct Everything {};
  template <class Body>
  void for_each_vector(Body body) const {
    const int64_t full = columns / LANES<T> * LANES<T>;  // end of the full vectors
    int64_t mixed_begin = larger(start, drop_begin / LANES<T> * LANES<T>);
    int64_t mixed_end = smaller(round_up(drop_end, LANES<T>), full);
    if (drop_begin >= drop_end) mixed_begin = mixed_end = start;
    if (codes) mixed_begin = start, mixed_end = full;
    const int64_t plain_ends[] = {smaller(mixed_begin, full), full};
    int64_t j = start;
    for (const int64_t end : plain_ends) {
      for (; j < end; j += LANES<T>) body(j, Everything{});
      for (const int64_t last = end < full ? mixed_end : columns; j < last; j += LANES<T>) body(j, keep(j));
    }
  }
};

template <class T>
inline Vector<T> where(Mask<T> kept, Vector<T> value, T otherwise) {
  return kept ? value : broadcast(otherwise);
}
template <class T>
inline Vector<T> where(typename KeptColumns<T>::Everything, Vector<T> value, T) {
  return value;
}

}  // namespace mcl::MCL_INSTRUCTION_SET
