// Rows divided by their norms, and the gradient of that. Each row is read once: the loss around the kernels is bound
// by memory.
#pragma once

#include "vector.h"

namespace mcl::MCL_INSTRUCTION_SET {

// 1 / |x|; 0 for a row without a direction.
template <class T>
T inverse_norm(const T* x, int64_t width) {
  const T norm = __builtin_sqrt(dot(x, x, width));
  return norm <= T(1e-12) ? T(0) : 1 / norm;
}

// unit_a_i = a_i / |a_i| and unit_b_i alike, cosine_i = <unit_a_i, unit_b_i>; without b the first alone.
template <class T>
void unit_rows(const Views<T>& views, int64_t begin, int64_t end, T* unit_a, T* unit_b, T* cosine) {
  const int64_t width = views.width;
  const auto write = [&](const T* x, T* to) {
    const T inverse = inverse_norm(x, width);
    for (int64_t d = 0; d < width; d++) to[d] = x[d] * inverse;
  };
  for (int64_t i = begin; i < end; i++) {
    T* row_a = unit_a + i * width;
    write(views.a + i * views.a_stride, row_a);
    if (!views.b) continue;
    T* row_b = unit_b + i * width;
    write(views.b + i * views.b_stride, row_b);
    cosine[i] = dot(row_a, row_b, width);
  }
}

// With y = x / |x|, its partner p in the cosine and incoming gradients g and w: (h - y <y, h>) / |x|, h = g + w p.
template <class T>
void unit_rows_backward(const Views<T>& views, int64_t begin, int64_t end, const T* grad_unit_a, const T* grad_unit_b,
                        const T* grad_cosine, T* grad_a, T* grad_b) {
  const int64_t width = views.width;
  for (int64_t i = begin; i < end; i++) {
    const T *a = views.a + i * views.a_stride, *grad_unit = grad_unit_a + i * width;
    const T inverse_a = inverse_norm(a, width);
    T* to = grad_a + i * width;
    if (!views.b) {
      const T along = dot(a, grad_unit, width) * inverse_a * inverse_a;
      for (int64_t d = 0; d < width; d++) to[d] = (grad_unit[d] - along * a[d]) * inverse_a;
      continue;
    }
    const T* b = views.b + i * views.b_stride;
    const T inverse_b = inverse_norm(b, width), product = dot(a, b, width);
    const auto project = [&](const T* x, T inverse, const T* partner, T weight, const T* g, T* to) {
      const T along = (dot(x, g, width) + weight * product) * inverse * inverse;
      for (int64_t d = 0; d < width; d++) to[d] = (g[d] + weight * partner[d] - along * x[d]) * inverse;
    };
    project(a, inverse_a, b, grad_cosine[i] * inverse_b, grad_unit, to);
    project(b, inverse_b, a, grad_cosine[i] * inverse_a, grad_unit_b + i * width, grad_b + i * width);
  }
}

}  // namespace mcl::MCL_INSTRUCTION_SET
