// Vectors of the widest registers this file is compiled for, and their exponential.
//
// Only GCC and Clang vector types: the same source is compiled for AVX-512, AVX2 and any other CPU. Everything is in
// the namespace of the instruction set, and no std function is called: the linker keeps one copy of an inline function
// for the entire library, and it could be one that was compiled here for AVX-512.
#pragma once

#include <cstdint>

#include "../common.h"

#if defined(__AVX512F__)
#define MCL_VECTOR_BYTES 64
#define MCL_PANEL_VECTORS 4  // 6 x 4 accumulators of 32 registers
#elif defined(__AVX__)
#define MCL_VECTOR_BYTES 32
#define MCL_PANEL_VECTORS 2  // 6 x 2 accumulators of 16 registers
#else
#define MCL_VECTOR_BYTES 16
#define MCL_PANEL_VECTORS 2
#endif

namespace mcl::MCL_INSTRUCTION_SET {

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef int32_t index;
  typedef float type __attribute__((vector_size(MCL_VECTOR_BYTES)));
  typedef int32_t mask __attribute__((vector_size(MCL_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef int64_t index;
  typedef double type __attribute__((vector_size(MCL_VECTOR_BYTES)));
  typedef int64_t mask __attribute__((vector_size(MCL_VECTOR_BYTES)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
using Mask = typename VectorOf<T>::mask;  // integers; lanes of a comparison are 0 or -1
template <class T>
using Index = typename VectorOf<T>::index;  // one lane of a mask

template <class T>
constexpr int64_t LANES = MCL_VECTOR_BYTES / sizeof(T);

template <class V, class P>
inline V load(const P* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

template <class V, class P>
inline void store(P* to, V v) {
  __builtin_memcpy(to, &v, sizeof(V));
}

template <class T>
inline Vector<T> broadcast(T x) {
  return x - Vector<T>{};
}

template <class A>
inline A smaller(A a, A b) {
  return b < a ? b : a;
}

template <class A>
inline A larger(A a, A b) {
  return a < b ? b : a;
}

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Lane i of the result is lane from[i] of the lanes of a followed by those of b. `from` is a constant.
template <class T>
inline Vector<T> shuffle(Vector<T> a, Vector<T> b, Mask<T> from) {
#if defined(__clang__)
  Vector<T> result;
  for (int64_t i = 0; i < LANES<T>; i++) result[i] = from[i] < LANES<T> ? a[from[i]] : b[from[i] - LANES<T>];
  return result;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// Returns a0 b0 a1 b1 ... of the first (HALF 0) or the second half (HALF 1) of the lanes.
template <class T, int HALF>
inline Vector<T> interleave(Vector<T> a, Vector<T> b) {
  Mask<T> from;
  for (int64_t i = 0; i < LANES<T>; i++) from[i] = (HALF * LANES<T> + i) / 2 + i % 2 * LANES<T>;
  return shuffle<T>(a, b, from);
}

// Lane i of the result is lane i + BY of v.
template <class T, int64_t BY>
inline Vector<T> rotate(Vector<T> v) {
  Mask<T> from;
  for (int64_t i = 0; i < LANES<T>; i++) from[i] = (i + BY) % LANES<T>;
  return shuffle<T>(v, v, from);
}

template <class T>
inline T sum_lanes(Vector<T> v) {
  if constexpr (LANES<T> > 8) v += rotate<T, 8>(v);
  if constexpr (LANES<T> > 4) v += rotate<T, 4>(v);
  if constexpr (LANES<T> > 2) v += rotate<T, 2>(v);
  v += rotate<T, 1>(v);
  return v[0];
}

// Returns whether a comparison holds in every lane.
template <class T>
inline bool every_lane(Mask<T> v) {
  Index<T> lanes[LANES<T>], every = -1;
  store(lanes, v);
  for (Index<T> lane : lanes) every &= lane;
  return every;
}

// Loads LANES<double> elements as fp64.
inline Vector<double> load_wide(const double* from) { return load<Vector<double>>(from); }
inline Vector<double> load_wide(const float* from) {
  typedef float Half __attribute__((vector_size(MCL_VECTOR_BYTES / 2)));
  return __builtin_convertvector(load<Half>(from), Vector<double>);
}

// <x, y> of two rows in fp64.
template <class T>
inline double wide_dot(const T* x, const T* y, int64_t width) {
  Vector<double> sums{};
  int64_t d = 0;
  for (; d + LANES<double> <= width; d += LANES<double>) sums += load_wide(x + d) * load_wide(y + d);
  double sum = sum_lanes<double>(sums);
  for (; d < width; d++) sum += double(x[d]) * double(y[d]);
  return sum;
}

// <x, y> of two rows.
template <class T>
inline T dot(const T* x, const T* y, int64_t width) {
  Vector<T> sums{};
  int64_t d = 0;
  for (; d + LANES<T> <= width; d += LANES<T>) sums += load<Vector<T>>(x + d) * load<Vector<T>>(y + d);
  T sum = sum_lanes<T>(sums);
  for (; d < width; d++) sum += x[d] * y[d];
  return sum;
}

// The largest lane; NaN lanes are ignored.
template <class T>
inline T largest_lane(Vector<T> v) {
  T lanes[LANES<T>], largest = -__builtin_inf();
  store(lanes, v);
  for (T lane : lanes) largest = larger(largest, lane);
  return largest;
}

constexpr double LOG2_E = 1.4426950408889634;

// 2^n 2^f for |f| <= 1/2. `shifted` is n + EXP_SHIFT: its lowest bits are n, since EXP_SHIFT has a last bit of value 1.
constexpr float EXP_SHIFT = 12582912.0f;  // 1.5 * 2^23
inline Vector<float> exp2_of_parts(Vector<float> shifted, Vector<float> f) {
  // The minimax polynomial of 2^f with value 1 at 0: relative error 2e-9 before rounding, 0.8e-7 after.
  Vector<float> p = f * 0x1.41fbbcp-13f + 0x1.5f3e54p-10f;
  p = p * f + 0x1.3b2d4cp-7f;
  p = p * f + 0x1.c6aee8p-5f;
  p = p * f + 0x1.ebfbdcp-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  typedef uint32_t Bits __attribute__((vector_size(MCL_VECTOR_BYTES)));  // unsigned, so that sums may wrap
  return (Vector<float>)((Bits)p + ((Bits)shifted << 23));
}

// A factor of logits, and the factor divided by ln 2 as high + low, 48 bits: rounded to one float, it would shift all
// logits in the same direction.
template <class T>
struct Factor {
  Vector<T> natural, high, low;
  explicit Factor(T factor)
      : natural(broadcast(factor)),
        high(broadcast(T(factor * LOG2_E))),
        low(broadcast(T(factor * LOG2_E - double(T(factor * LOG2_E))))) {}
};

// exp(x * factor) 2^-offset for an integer offset, if the result is a normal number.
inline Vector<float> exp_of_product(Vector<float> x, const Factor<float>& factor, float offset,
                                    Vector<float>& shifted) {
  const float shift = EXP_SHIFT - offset;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  // Fused, so that x * high enters the difference unrounded.
  shifted = x * factor.high + shift;
  return exp2_of_parts(shifted, x * factor.high - (shifted - shift) + x * factor.low);
#else
  const Vector<float> logit = x * factor.natural;
  shifted = logit * float(LOG2_E) + shift;
  const Vector<float> n = shifted - shift;
  const Vector<float> rest = logit - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts, one of 9 bits
  return exp2_of_parts(shifted, rest * float(LOG2_E));
#endif
}

// exp(x * factor), for products from -87 to 88.
inline Vector<float> exp_of_product(Vector<float> x, const Factor<float>& factor) {
  Vector<float> shifted;
  return exp_of_product(x, factor, 0, shifted);
}

// exp(x * factor) 2^-offset for an integer offset; 0 below the normal numbers, undefined if it overflows.
inline Vector<float> exp_of_product(Vector<float> x, const Factor<float>& factor, float offset) {
  Vector<float> shifted;
  const Vector<float> e = exp_of_product(x, factor, offset, shifted);
  return shifted < EXP_SHIFT - 126 ? Vector<float>{} : e;
}

// exp(x) for any x: 0 below the normal numbers, inf above the largest, NaN stays NaN.
inline Vector<float> exp_anywhere(Vector<float> x) {
  Vector<float> y = x * float(LOG2_E);
  const Mask<float> huge = y > 127.0f, tiny = y < -126.0f, over = y >= 128.0f;
  y = huge ? y - 1.0f : y;
  y = tiny ? Vector<float>{} : y;
  const Vector<float> shifted = y + EXP_SHIFT;
  Vector<float> e = exp2_of_parts(shifted, y - (shifted - EXP_SHIFT));
  e = huge ? e + e : e;
  e = over ? broadcast(__builtin_inff()) : e;
  e = tiny ? Vector<float>{} : e;
  return x != x ? x : e;
}

// fp64 is for checks: the C library's exponential, lane by lane.
inline Vector<double> exp_anywhere(Vector<double> x) {
  for (int64_t i = 0; i < LANES<double>; i++) x[i] = __builtin_exp(x[i]);
  return x;
}

inline Vector<double> exp_of_product(Vector<double> x, const Factor<double>& factor, double offset = 0) {
  const Vector<double> logit = x * factor.natural;
  for (int64_t i = 0; i < LANES<double>; i++)
    x[i] = __builtin_exp(logit[i] - offset * 0.69314718055994531);
  return x;
}

}  // namespace mcl::MCL_INSTRUCTION_SET
