// Divides rows by their norms, and computes the gradient. Each row is read once, since the losses are memory-bound.
#pragma once

#include "normalize_problem.h"
#include "vector.h"

namespace mcl::MCL_INSTRUCTION_SET {

// 1 / |x| as two factors, `scale` and `inverse` = 1 / |scale x|. `scale` is a power of two: 1, unless |x|^2 overflows T
// or nearly does. Two factors are kept, since 1 / |x| itself may be below the normal numbers. `inverse` is 0 for a row
// without a direction, and NaN for a row that is not finite.
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
  const InverseNorm<T> norm(x, width);
  if (norm.scale == 1)
    for (int64_t d = 0; d < width; d++) to[d] = x[d] * norm.inverse;
  else
    for (int64_t d = 0; d < width; d++) to[d] = x[d] * norm.scale * norm.inverse;
}

// unit_a_i = a_i / |a_i|, unit_b_i = b_i / |b_i| and cosine_i = <unit_a_i, unit_b_i>; without b only unit_a.
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

// <x, y> of rows multiplied by their scales, which are 1 unless SCALED.
template <bool SCALED, class T>
T scaled_dot(const T* x, T x_scale, const T* y, T y_scale, int64_t width) {
  if (!SCALED) return dot(x, y, width);
  T sum = 0;
  for (int64_t d = 0; d < width; d++) sum += (x[d] * x_scale) * (y[d] * y_scale);
  return sum;
}

// The gradient of a row x that is paired with another view: (h - y <y, h>) / |x| with y = x / |x| and h = g + w p. The
// unit row p is the partner of y in the cosine; g and w are the incoming gradients of y and of the cosine.
template <bool SCALED, class T>
void project_row(const T* x, const InverseNorm<T>& x_norm, const T* partner, const InverseNorm<T>& partner_norm,
                 T product, T w, const T* g, int64_t width, T* to) {
  const T scale = SCALED ? x_norm.scale : T(1), partner_scale = SCALED ? partner_norm.scale : T(1);
  const T inverse = x_norm.inverse, weight = w * partner_norm.inverse;
  const T along = (scaled_dot<SCALED>(x, scale, g, T(1), width) + weight * product) * inverse * inverse;
  for (int64_t d = 0; d < width; d++)
    to[d] = (g[d] + weight * (partner[d] * partner_scale) - along * (x[d] * scale)) * inverse * scale;
}

// The gradient of a row without a second view: (g - y <y, g>) / |x|.
template <bool SCALED, class T>
void project_alone(const T* x, const InverseNorm<T>& x_norm, const T* g, int64_t width, T* to) {
  const T scale = SCALED ? x_norm.scale : T(1), inverse = x_norm.inverse;
  const T along = scaled_dot<SCALED>(x, scale, g, T(1), width) * inverse * inverse;
  for (int64_t d = 0; d < width; d++) to[d] = (g[d] - along * (x[d] * scale)) * inverse * scale;
}

template <class T>
void unit_rows_backward(const Views<T>& views, int64_t begin, int64_t end, const T* grad_unit_a, const T* grad_unit_b,
                        const T* grad_cosine, T* grad_a, T* grad_b) {
  const int64_t width = views.width;
  for (int64_t i = begin; i < end; i++) {
    const T *a = views.a + i * views.a_stride, *g_a = grad_unit_a + i * width;
    const InverseNorm<T> a_norm(a, width);
    T* to_a = grad_a + i * width;
    if (!views.b) {
      const auto project = a_norm.scale == 1 ? project_alone<false, T> : project_alone<true, T>;
      project(a, a_norm, g_a, width, to_a);
      continue;
    }
    const T *b = views.b + i * views.b_stride, *g_b = grad_unit_b + i * width;
    const T w = grad_cosine[i];
    const InverseNorm<T> b_norm(b, width);
    const bool scaled = a_norm.scale != 1 || b_norm.scale != 1;
    const T product = scaled ? scaled_dot<true>(a, a_norm.scale, b, b_norm.scale, width) : dot(a, b, width);
    const auto project = scaled ? project_row<true, T> : project_row<false, T>;
    project(a, a_norm, b, b_norm, product, w, g_a, width, to_a);
    project(b, b_norm, a, a_norm, product, w, g_b, width, grad_b + i * width);
  }
}

}  // namespace mcl::MCL_INSTRUCTION_SET
