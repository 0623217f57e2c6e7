// Binds the kernels that normalise rows to torch.
#include <algorithm>

#include "dispatch.h"
#include "operators.h"
#include "tensors.h"

namespace mcl {
namespace {

// One view, or two views of the same samples.
template <class T>
struct ViewTensors {
  Tensor a, b;
  Views<T> views;

  ViewTensors(const Tensor& view_a, const OptionalTensor& view_b)
      : a(with_dense_rows(view_a)), b(view_b ? with_dense_rows(*view_b) : Tensor()) {
    views = {a.const_data_ptr<T>(), view_b ? b.const_data_ptr<T>() : nullptr, a.stride(0), view_b ? b.stride(0) : 0,
             a.size(1)};
  }

  // Calls work(begin, end) for ranges that cover the samples, in parallel if there are enough of them.
  template <class Work>
  void for_each_part(const Work& work) const {
    constexpr int64_t MIN_ELEMENTS = 1 << 14;  // of a part: with fewer, a thread costs more than it saves
    const int64_t size = a.size(0);
    if (thread_count() == 1)
      work(0, size);
    else
      at::parallel_for(0, size, MIN_ELEMENTS / std::max<int64_t>(views.width, 1) + 1, work);
  }
};

template <class T>
std::tuple<Tensor, Tensor> forward(const Tensor& view_a, const OptionalTensor& view_b) {
  const ViewTensors<T> tensors(view_a, view_b);
  const int64_t n = view_a.size(0), width = view_a.size(1);
  Tensor rows = at::empty({view_b ? 2 * n : n, width}, view_a.options());
  Tensor cosine = at::empty({view_b ? n : 0}, view_a.options());
  T *unit_data = rows.mutable_data_ptr<T>(), *cosine_data = cosine.mutable_data_ptr<T>();
  const Kernels<T> kernels = choose_kernels<T>(false);
  tensors.for_each_part([&](int64_t begin, int64_t end) {
    kernels.unit_rows(tensors.views, begin, end, unit_data, unit_data + n * width, cosine_data);
  });
  return {rows, cosine};
}

template <class T>
std::tuple<Tensor, Tensor> backward(const Tensor& view_a, const OptionalTensor& view_b, const Tensor& grad_rows,
                                    const Tensor& grad_cosine) {
  const ViewTensors<T> tensors(view_a, view_b);
  const int64_t n = view_a.size(0), width = view_a.size(1);
  const Tensor dense_rows = grad_rows.contiguous(), dense_cosine = grad_cosine.contiguous();
  Tensor grad_a = at::empty(view_a.sizes(), view_a.options());
  Tensor grad_b = at::empty(view_b ? view_a.sizes() : at::IntArrayRef{0}, view_a.options());
  const T *grad_unit = dense_rows.const_data_ptr<T>(), *cosine_data = dense_cosine.const_data_ptr<T>();
  T *a_data = grad_a.mutable_data_ptr<T>(), *b_data = grad_b.mutable_data_ptr<T>();
  const Kernels<T> kernels = choose_kernels<T>(false);
  tensors.for_each_part([&](int64_t begin, int64_t end) {
    kernels.unit_rows_backward(tensors.views, begin, end, grad_unit, grad_unit + n * width, cosine_data, a_data,
                               b_data);
  });
  return {grad_a, grad_b};
}

}  // namespace

std::tuple<Tensor, Tensor> unit_rows(const Tensor& view_a, const OptionalTensor& view_b) {
  return view_a.scalar_type() == at::kDouble ? forward<double>(view_a, view_b) : forward<float>(view_a, view_b);
}

std::tuple<Tensor, Tensor> unit_rows_backward(const Tensor& view_a, const OptionalTensor& view_b,
                                              const Tensor& grad_rows, const Tensor& grad_cosine) {
  return view_a.scalar_type() == at::kDouble ? backward<double>(view_a, view_b, grad_rows, grad_cosine)
                                             : backward<float>(view_a, view_b, grad_rows, grad_cosine);
}

}  // namespace mcl
