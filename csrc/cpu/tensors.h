// Tensors as the kernels take them, working memory and threads: shared by the bindings of all operations.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <pthread.h>

#include <functional>

#include "../common_torch.h"

namespace mcl {

inline OptionalTensor contiguous(const OptionalTensor& x) {
  return x ? OptionalTensor(x->contiguous()) : std::nullopt;
}

// Kernels take any row stride, but the elements of a row must be adjacent.
inline Tensor with_dense_rows(const Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous();
}

// Working memory for the kernels, aligned to 64 bytes.
struct Workspace {
  Tensor bytes;
  char* data;

  explicit Workspace(int64_t size) : bytes(at::empty({size + 64}, at::TensorOptions().dtype(at::kByte))) {
    data = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(bytes.mutable_data_ptr()) + 63) / 64 * 64);
  }
};

// A forked child lacks the threads of its parent, and OpenMP would wait for them forever.
inline bool forked = false;
[[maybe_unused]] inline const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

inline int64_t thread_count() { return forked || at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Calls work(thread) for each thread 0 .. threads - 1.
inline void parallel_for(int64_t threads, const std::function<void(int64_t)>& work) {
  if (threads == 1) {
    work(0);
    return;
  }
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++) work(thread);
  });
}

}  // namespace mcl
