// CUDA C++ as C++: g++ compiles the kernels with this directory in the place of the toolkit's headers, and they run on
// the processor. For tests: it shows what a kernel computes, and which barriers it needs, not how long it takes.
//
// Blocks run one after the other. The threads of a block are fibers on one thread of the system, each running to its
// next barrier; with CUDA_ON_CPU_THREADS they are threads of the system, for ThreadSanitizer. Shared memory is all NaN
// when a block starts, and lanes of a warp see each other's writes behind a barrier only, as CUDA guarantees no more.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#if defined(CUDA_ON_CPU_THREADS)
#include <atomic>
#include <condition_variable>
#include <thread>
#else
#include <csetjmp>
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace cuda_on_cpu {

constexpr int WARP = 32, MOST_THREADS = 1024, MOST_SHARED = 48 * 1024;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", message);
  std::abort();
}

// Shared memory of the block that runs, and bytes behind it that nobody may write.
constexpr int GUARD = 4096;
constexpr unsigned char POISON = 0xff;  // bytes of NaN, whatever the type

}  // namespace cuda_on_cpu

// What a kernel's `extern __shared__ char shared_bytes[]` names.
alignas(128) inline char shared_bytes[cuda_on_cpu::MOST_SHARED + cuda_on_cpu::GUARD];

inline dim3 gridDim, blockDim, blockIdx;
#if defined(CUDA_ON_CPU_THREADS)
inline thread_local dim3 threadIdx;
#else
inline dim3 threadIdx;
#endif

namespace cuda_on_cpu {

#if defined(CUDA_ON_CPU_THREADS)

// Its rooms are entered in turn: a thread that is late to leave one is not ordered with those in the next.
struct Barrier {
  struct Room {
    std::mutex mutex;
    std::condition_variable all_here;
    int arrived = 0;
  };
  Room rooms[2];
  std::atomic<unsigned> passed{0};
};

class Threads {
 public:
  void run(int count, const std::function<void()>& body) {
    std::vector<std::thread> threads;
    for (int t = 0; t < count; t++)
      threads.emplace_back([&, t] {
        threadIdx = {unsigned(t), 0, 0};
        body();
      });
    for (std::thread& thread : threads) thread.join();
  }

  // Returns once `count` threads are here.
  void wait(Barrier& barrier, int count) {
    const unsigned before = barrier.passed.load(std::memory_order_relaxed);
    Barrier::Room& room = barrier.rooms[before % 2];
    std::unique_lock lock(room.mutex);
    if (++room.arrived == count) {
      room.arrived = 0;
      barrier.passed.store(before + 1, std::memory_order_relaxed);
      room.all_here.notify_all();
    }
    room.all_here.wait(lock, [&] { return barrier.passed.load(std::memory_order_relaxed) != before; });
  }
};

#else

struct Barrier {
  int arrived = 0, passed = 0;
};

// Fibers start with makecontext and go on with longjmp, which asks nothing of the system.
class Threads {
 public:
  void run(int count, const std::function<void()>& body) {
    body_ = &body;
    count_ = count;
    fibers_.resize(std::max<size_t>(fibers_.size(), count));
    for (int t = 0; t < count; t++) fibers_[t].begun = fibers_[t].ended = false;
    left_ = count;
    idle_ = 0;
    if (_setjmp(caller_) == 0) resume(0);
  }

  void wait(Barrier& barrier, int count) {
    const int before = barrier.passed;
    if (++barrier.arrived == count) {
      barrier.arrived = 0;
      barrier.passed++;
      idle_ = 0;
      return;
    }
    while (barrier.passed == before) {
      if (++idle_ > 2 * count_) fail("a barrier that some threads of the block do not reach");
      switch_to_next();
    }
  }

 private:
  static constexpr size_t STACK = 128 * 1024;
  struct Fiber {
    std::vector<char> stack;
    jmp_buf state;
    bool begun, ended;
  };

  void switch_to_next() {
    const int self = threadIdx.x;
    if (_setjmp(fibers_[self].state) == 0) resume(next_of(self));
  }

  int next_of(int t) const {
    do t = (t + 1) % count_;
    while (fibers_[t].ended);
    return t;
  }

  [[noreturn]] void resume(int t) {
    Fiber& fiber = fibers_[t];
    threadIdx = {unsigned(t), 0, 0};
    if (fiber.begun) _longjmp(fiber.state, 1);
    fiber.begun = true;
    fiber.stack.resize(STACK);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.data();
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    running_ = this;
    makecontext(&context, &Threads::begin, 0);
    setcontext(&context);
    fail("setcontext");
  }

  static void begin() {
    Threads& threads = *running_;
    (*threads.body_)();
    threads.fibers_[threadIdx.x].ended = true;
    threads.idle_ = 0;
    if (--threads.left_ == 0) _longjmp(threads.caller_, 1);
    threads.resume(threads.next_of(threadIdx.x));
  }

  static inline Threads* running_;
  const std::function<void()>* body_;
  std::vector<Fiber> fibers_;
  jmp_buf caller_;
  int count_, left_, idle_;
};

#endif

// The block that runs.
inline Threads threads;
inline Barrier block_barrier, warp_barriers[MOST_THREADS / WARP];
inline uint64_t exchanged[MOST_THREADS];  // what each lane shows the others of its warp
inline std::mutex one_launch;

// The barrier of the block that tests leave out, "FILE:LINE"; null: none.
inline const char* left_out = nullptr;

inline void wait_for_block(const char* path, int line) {
  if (left_out) {
    const char* slash = std::strrchr(path, '/');
    if (left_out == std::string(slash ? slash + 1 : path) + ":" + std::to_string(line)) return;
  }
  threads.wait(block_barrier, blockDim.x);
}

inline void wait_for_warp(unsigned mask) {
  if (mask != 0xffffffff) fail("a warp's barrier without all of its lanes");
  threads.wait(warp_barriers[threadIdx.x / WARP], WARP);
}

template <class T>
T value_of_lane(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const int first = threadIdx.x / WARP * WARP;
  std::memcpy(&exchanged[threadIdx.x], &value, sizeof(T));
  wait_for_warp(mask);
  T result;
  std::memcpy(&result, &exchanged[first + lane], sizeof(T));
  wait_for_warp(mask);
  return result;
}

}  // namespace cuda_on_cpu

#define __syncthreads() cuda_on_cpu::wait_for_block(__FILE__, __LINE__)
inline void __syncwarp(unsigned mask = 0xffffffff) { cuda_on_cpu::wait_for_warp(mask); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return cuda_on_cpu::value_of_lane(mask, value, (threadIdx.x % cuda_on_cpu::WARP) ^ lanes);
}

// g++ fuses a product with the sum behind it, as nvcc does; but not what went through memory.
template <class T>
T __product_rn(T x, T y) {
  T result = x * y;
  asm("" : "+m"(result));
  return result;
}
inline float __fmul_rn(float x, float y) { return __product_rn(x, y); }
inline double __dmul_rn(double x, double y) { return __product_rn(x, y); }

using std::max;
using std::min;

// --- launches ---

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* launch, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_on_cpu;
  const dim3 grid = launch->gridDim, block = launch->blockDim;
  const size_t bytes = launch->dynamicSmemBytes;
  if (grid.x == 0 || grid.y != 1 || grid.z != 1 || block.x == 0 || block.x % WARP || block.x > MOST_THREADS ||
      block.y != 1 || block.z != 1 || bytes > MOST_SHARED)
    return cudaErrorInvalidConfiguration;
  const std::lock_guard lock(one_launch);
  gridDim = grid;
  blockDim = block;
  for (unsigned index = 0; index < grid.x; index++) {
    blockIdx = {index, 0, 0};
    std::memset(shared_bytes, POISON, bytes + GUARD);
    threads.run(block.x, [&] { kernel(arguments...); });
    for (int i = 0; i < GUARD; i++)
      if (static_cast<unsigned char>(shared_bytes[bytes + i]) != POISON) fail("a write behind the shared memory");
  }
  return cudaSuccess;
}
