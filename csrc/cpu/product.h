// C += A B for blocks in the cache, on the vector unit.
#pragma once

#include "vector.h"

namespace mcl::MCL_INSTRUCTION_SET {

constexpr int64_t GROUP = 6;    // rows of C that a micro-kernel holds in registers; blocks are padded to it
constexpr int64_t DEPTH = 128;  // of one pass over C: a panel of B of this depth stays in the first-level cache

template <class T>
constexpr int64_t PANEL = MCL_PANEL_VECTORS * LANES<T>;  // columns of C that a micro-kernel holds

// The nonzero part of A if A is a triangle: row group i uses depth first + i .. last + i + GROUP - 1.
struct Band {
  int64_t first = INT64_MIN / 2, last = INT64_MAX / 2;
};

template <class T>
struct Operands {
  int64_t rows, columns, depth;  // of C and A; columns is a multiple of LANES, rows are padded to GROUP
  const T* a;                    // [rows, depth], or [depth, rows] if TRANSPOSED
  int64_t a_stride;
  const T* b;  // [depth, columns], panel p of the columns at b + p * b_panel
  int64_t b_stride, b_panel;
  T* c;  // [rows, columns]
  int64_t c_stride;
  bool accumulate;  // else C = A B
};

// Computes GROUP rows and VECTORS vectors of C; a(i, k) is the element of A. The sums of a pass start at zero, so that
// their rounding errors do not grow with the values already in C.
template <class T, int VECTORS, class Elements>
inline void micro_kernel(bool accumulate, int64_t depth, const Elements& a, const T* b, int64_t b_stride, T* c,
                         int64_t c_stride) {
  using V = Vector<T>;
  V sums[GROUP][VECTORS] = {};
#pragma GCC unroll 6
  for (int i = 0; i < GROUP; i++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) __builtin_prefetch(c + i * c_stride + v * LANES<T>, 1);
  for (int64_t k = 0; k < depth; k++) {
    V row[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) row[v] = load<V>(b + k * b_stride + v * LANES<T>);
#pragma GCC unroll 6
    for (int i = 0; i < GROUP; i++) {
      const V factor = broadcast(a(i, k));
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sums[i][v] += factor * row[v];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < GROUP; i++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      T* to = c + i * c_stride + v * LANES<T>;
      store(to, accumulate ? load<V>(to) + sums[i][v] : sums[i][v]);
    }
}

// The micro-kernel of that many vectors.
template <class T, class Elements>
inline void multiply_group(int64_t vectors, bool accumulate, int64_t depth, const Elements& a, const T* b,
                           int64_t b_stride, T* c, int64_t c_stride) {
  switch (vectors) {
    case 1: micro_kernel<T, 1>(accumulate, depth, a, b, b_stride, c, c_stride); break;
    case 2: micro_kernel<T, 2>(accumulate, depth, a, b, b_stride, c, c_stride); break;
#if MCL_PANEL_VECTORS == 4
    case 3: micro_kernel<T, 3>(accumulate, depth, a, b, b_stride, c, c_stride); break;
    case 4: micro_kernel<T, 4>(accumulate, depth, a, b, b_stride, c, c_stride); break;
#endif
  }
}

template <class T, bool TRANSPOSED>
void multiply_add(const Operands<T>& o, Band band = {}) {
  const int64_t passes = (o.depth + DEPTH - 1) / DEPTH;
  for (int64_t pass = 0; pass < passes; pass++) {
    const int64_t k_begin = o.depth * pass / passes, k_end = o.depth * (pass + 1) / passes;
    for (int64_t j = 0; j < o.columns; j += PANEL<T>) {
      const T* b_panel = o.b + j / PANEL<T> * o.b_panel;
      const int64_t vectors = smaller(PANEL<T>, o.columns - j) / LANES<T>;
      for (int64_t i = 0; i < o.rows; i += GROUP) {
        const int64_t first = larger(k_begin, band.first + i), end = smaller(k_end, band.last + i + GROUP);
        if (first >= end) continue;
        const T* a = TRANSPOSED ? o.a + first * o.a_stride + i : o.a + i * o.a_stride + first;
        const int64_t stride = o.a_stride;
        const auto elements = [a, stride](int row, int64_t k) {
          return TRANSPOSED ? a[k * stride + row] : a[row * stride + k];
        };
        multiply_group<T>(vectors, o.accumulate || pass > 0, end - first, elements, b_panel + first * o.b_stride,
                          o.b_stride, o.c + i * o.c_stride + j, o.c_stride);
      }
    }
  }
}

}  // namespace mcl::MCL_INSTRUCTION_SET
