// Rows divided by their norms, and the gradient of that. Each row is read once: the loss around the kernels is bound
// by memory.
#pragma once

#include "vector.h"

namespace mcl::MCL_INSTRUCTION_SET {

// 1 / |x| in two factors: `inverse` of `scale` x, a row whose square is a number of T. `scale` is a power of two, and 1
// unless that of x itself is not, or nearly not; 1 / |x| alone may be below the normal numbers then. `inverse` is 0 for a
// row without a direction, and NaN for one that is not finite.
template <class T>
struct InverseNorm {
  T scale = 1, inverse;

  InverseNorm(const T* x, int64_t width) {
    constexpr bool IS_FLOAT = sizeof(T) == sizeof(float);
    T square = dot(x, x, width);
    if (!(square <= T(IS_FLOAT ? 0x1p120 : 0x1p1016))) {
      scale = T(IS_FLOAT ? 0x1p-80 : 0x1p-540);
      square = 0;
      for (int64_t d = 0; d < width; d++) square += (x[d] * scale) * (x[d] * scale);
      if (square == T(__builtin_inf())) square = T(__builtin_nan(""));
    }
    const T norm = __builtin_sqrt(square);
    inverse = norm <= T(1e-12) ? T(0) : 1 / norm;
  }
};

// to = x / |x|, 0 for a row without a direction.
template <class T>
void normalize_row(const T* x, int64_t width, T* to) {
  const InverseNorm<T> of_row(x, width);
  if (of_row.scale == 1)
    for (int64_t d = 0; d < width; d++) to[d] = x[d] * of_row.inverse;
  else
    for (int64_t d = 0; d < width; d++) to[d] = x[d] * of_row.scale * of_row.inverse;
}

// unit_a_i = a_i / |a_i| and unit_b_i alike, cosine_i = <unit_a_i, unit_b_i>; without b the first alone.
template <class T>
void unit_rows(const Views<T>& views, int64_t begin, int64_t end, T* unit_a, T* unit_b, T* cosine) {
  const int64_t width = views.width;
  for (int64_t i = begin; i < end; i++) {
    T* row_a = unit_a + i * width;
    normalize_row(views.a + i * views.a_stride, width, row_a);
    if (!views.b) continue;
    T* row_b = unit_b + i * width;
    normalize_row(views.b + i * views.b_stride, width, row_b);
    cosine[i] = dot(row_a, row_b, width);
  }
}

// <x, y> of rows times their factors, which are 1 unless SCALED.
template <bool SCALED, class T>
T scaled_dot(const T* x, T x_scale, const T* y, T y_scale, int64_t width) {
  if (!SCALED) return dot(x, y, width);
  T sum = 0;
  for (int64_t d = 0; d < width; d++) sum += (x[d] * x_scale) * (y[d] * y_scale);
  return sum;
}

// With y = x / |x|, its partner p in the cosine and incoming gradients g and w: (h - y <y, h>) / |x|, h = g + w p.
template <bool SCALED, class T>
void project_row(const T* x, const InverseNorm<T>& of_x, const T* partner, const InverseNorm<T>& of_partner, T product,
                 T w, const T* g, int64_t width, T* to) {
  const T scale = SCALED ? of_x.scale : T(1), partner_scale = SCALED ? of_partner.scale : T(1);
  const T inverse = of_x.inverse, weight = w * of_partner.inverse;
  const T along = (scaled_dot<SCALED>(x, scale, g, T(1), width) + weight * product) * inverse * inverse;
  for (int64_t d = 0; d < width; d++)
    to[d] = (g[d] + weight * (partner[d] * partner_scale) - along * (x[d] * scale)) * inverse * scale;
}

// The gradients of a row of one view.
template <bool SCALED, class T>
void project_alone(const T* x, const InverseNorm<T>& of_x, const T* g, int64_t width, T* to) {
  const T scale = SCALED ? of_x.scale : T(1), inverse = of_x.inverse;
  const T along = scaled_dot<SCALED>(x, scale, g, T(1), width) * inverse * inverse;
  for (int64_t d = 0; d < width; d++) to[d] = (g[d] - along * (x[d] * scale)) * inverse * scale;
}

template <class T>
void unit_rows_backward(const Views<T>& views, int64_t begin, int64_t end, const T* grad_unit_a, const T* grad_unit_b,
                        const T* grad_cosine, T* grad_a, T* grad_b) {
  const int64_t width = views.width;
  for (int64_t i = begin; i < end; i++) {
    const T *a = views.a + i * views.a_stride, *g_a = grad_unit_a + i * width;
    const InverseNorm<T> of_a(a, width);
    T* to_a = grad_a + i * width;
    if (!views.b) {
      const auto project = of_a.scale == 1 ? project_alone<false, T> : project_alone<true, T>;
      project(a, of_a, g_a, width, to_a);
      continue;
    }
    const T *b = views.b + i * views.b_stride, *g_b = grad_unit_b + i * width;
    const T w = grad_cosine[i];
    const InverseNorm<T> of_b(b, width);
    const bool scaled = of_a.scale != 1 || of_b.scale != 1;
    const T product = scaled ? scaled_dot<true>(a, of_a.scale, b, of_b.scale, width) : dot(a, b, width);
    const auto project = scaled ? project_row<true, T> : project_row<false, T>;
    project(a, of_a, b, of_b, product, w, g_a, width, to_a);
    project(b, of_b, a, of_a, product, w, g_b, width, grad_b + i * width);
  }
}

}  // namespace mcl::MCL_INSTRUCTION_SET
