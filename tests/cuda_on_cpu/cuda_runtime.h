// CUDA C++ as C++: g++ compiles the kernels with this directory in place of the toolkit's headers, and they run on the
// CPU. Tests use it to check results and barriers; it does not model time.
//
// Blocks run one after the other; the blocks of a cooperative launch take turns, from one barrier of the grid to the
// next. The threads of a block are fibers on one system thread, each running to its next barrier; with
// CUDA_ON_CPU_THREADS they are system threads, for ThreadSanitizer. Shared memory is all NaN when a block starts. Lanes
// of a warp see each other's writes only after a barrier, since CUDA guarantees no more. A race between blocks is not
// reported; it shows only as a wrong result, if an earlier block reads the result of a later one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
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

constexpr int WARP = 32, MAX_THREADS = 1024, MAX_SHARED = 48 * 1024;
constexpr int MULTIPROCESSORS = 3;  // each holds one block: when planning, some blocks sort two tiles, and some none

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", message);
  std::abort();
}

// Shared memory of the running block is followed by GUARD bytes that must not be written.
constexpr int GUARD = 4096;
constexpr unsigned char POISON = 0xff;  // bytes of NaN, whatever the type

}  // namespace cuda_on_cpu

// The array that kernels declare as `extern __shared__ char shared_bytes[]`.
alignas(128) inline char shared_bytes[cuda_on_cpu::MAX_SHARED + cuda_on_cpu::GUARD];

#if defined(CUDA_ON_CPU_THREADS)
#define CUDA_ON_CPU_OWN thread_local
#else
#define CUDA_ON_CPU_OWN
#endif

inline dim3 gridDim, blockDim;
inline CUDA_ON_CPU_OWN dim3 blockIdx, threadIdx;

namespace cuda_on_cpu {

struct Block;
inline CUDA_ON_CPU_OWN Block* block;  // the running one

#if defined(CUDA_ON_CPU_THREADS)

// Successive waits alternate between two rooms, so that ThreadSanitizer does not order a thread that leaves one wait
// late with the threads in the next.
struct Barrier {
  struct Room {
    std::mutex mutex;
    std::condition_variable all_arrived;
    int arrived = 0;
  };
  Room rooms[2];
  std::atomic<unsigned> passed{0};
};

// The threads of a block and their state.
class Threads {
 public:
  // Starts `count` threads. Like `go_on`, returns when all have ended or the block has handed over.
  void run(int count, const std::function<void()>& body) {
    left_ = count;
    inside_ = true;
    for (int t = 0; t < count; t++)
      threads_.emplace_back([this, t, &body, own_block = block, own_index = blockIdx] {
        block = own_block;
        blockIdx = own_index;
        threadIdx = {unsigned(t), 0, 0};
        body();
        const std::lock_guard lock(mutex_);
        if (--left_ == 0) leave();
      });
    wait_outside();
  }

  void go_on() {
    {
      const std::lock_guard lock(mutex_);
      inside_ = true;
      changed_.notify_all();
    }
    wait_outside();
  }

  bool ended() const { return left_ == 0; }

  // Lets other blocks run before this one resumes. Called by one thread, while the others wait at a barrier.
  void hand_over() {
    std::unique_lock lock(mutex_);
    leave();
    changed_.wait(lock, [&] { return inside_; });
  }

  // Returns once `count` threads have arrived.
  void wait(Barrier& barrier, int count) {
    const unsigned before = barrier.passed.load(std::memory_order_relaxed);
    Barrier::Room& room = barrier.rooms[before % 2];
    std::unique_lock lock(room.mutex);
    if (++room.arrived == count) {
      room.arrived = 0;
      barrier.passed.store(before + 1, std::memory_order_relaxed);
      room.all_arrived.notify_all();
    }
    room.all_arrived.wait(lock, [&] { return barrier.passed.load(std::memory_order_relaxed) != before; });
  }

 private:
  void leave() {
    inside_ = false;
    changed_.notify_all();
  }

  void wait_outside() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return !inside_; });
    lock.unlock();
    if (!ended()) return;
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool inside_ = false;  // whether the block runs, rather than its launcher
  int left_ = 0;
};

#else

struct Barrier {
  int arrived = 0, passed = 0;
};

// The threads of a block and their state: fibers, which start with makecontext and resume with longjmp, which needs no
// system call.
class Threads {
 public:
  // Starts `count` threads. Like `go_on`, returns when all have ended or the block has handed over.
  void run(int count, const std::function<void()>& body) {
    body_ = &body;
    count_ = count;
    fibers_.resize(std::max<size_t>(fibers_.size(), count));
    for (int t = 0; t < count; t++) fibers_[t].begun = fibers_[t].ended = false;
    left_ = count;
    handing_ = 0;
    go_on();
  }

  void go_on() {
    idle_ = 0;
    if (_setjmp(caller_) == 0) resume(handing_);
  }

  bool ended() const { return left_ == 0; }

  // Lets other blocks run before this one resumes. Called by one thread, while the others wait at a barrier.
  void hand_over() {
    handing_ = threadIdx.x;
    if (_setjmp(fibers_[handing_].state) == 0) _longjmp(caller_, 1);
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
  int count_, left_, idle_, handing_;
};

#endif

// The state of a block, and a copy of its shared memory from when it handed over.
struct Block {
  Threads threads;
  Barrier barrier, warp_barriers[MAX_THREADS / WARP];
  uint64_t exchanged[MAX_THREADS];  // the value that each lane passes to its warp
  char shared[sizeof shared_bytes];
};

inline std::deque<Block> blocks;
inline bool together;  // whether all blocks of the grid are resident
inline bool holds_grids = true;  // whether the device supports that; tests also run without
inline std::mutex one_launch;

// The barrier that a test leaves out, as "FILE:LINE"; null: none.
inline const char* left_out = nullptr;

inline bool is_left_out(const char* path, int line) {
  if (!left_out) return false;
  const char* slash = std::strrchr(path, '/');
  return left_out == std::string(slash ? slash + 1 : path) + ":" + std::to_string(line);
}

inline void wait_for_block(const char* path, int line) {
  if (!is_left_out(path, line)) block->threads.wait(block->barrier, blockDim.x);
}

inline void wait_for_grid(const char* path, int line) {
  if (is_left_out(path, line)) return;
  if (!together) fail("a barrier of a grid whose blocks may not all be resident");
  block->threads.wait(block->barrier, blockDim.x);
  if (threadIdx.x == 0) block->threads.hand_over();
  block->threads.wait(block->barrier, blockDim.x);
}

inline void wait_for_warp(unsigned mask) {
  if (mask != 0xffffffff) fail("a warp's barrier without all of its lanes");
  block->threads.wait(block->warp_barriers[threadIdx.x / WARP], WARP);
}

template <class T>
T value_of_lane(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const int first = threadIdx.x / WARP * WARP;
  std::memcpy(&block->exchanged[threadIdx.x], &value, sizeof(T));
  wait_for_warp(mask);
  T result;
  std::memcpy(&result, &block->exchanged[first + lane], sizeof(T));
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

template <class T>
T __shfl_up_sync(unsigned mask, T value, int lanes) {
  const int lane = threadIdx.x % cuda_on_cpu::WARP;
  return cuda_on_cpu::value_of_lane(mask, value, lane < lanes ? lane : lane - lanes);
}

// g++ fuses a product with the following sum, as nvcc does, unless the product passes through memory.
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

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrCooperativeLaunch };
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_on_cpu::MULTIPROCESSORS : cuda_on_cpu::holds_grids;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_on_cpu {

// Runs blocks `first` .. `past` - 1 in turn until all have ended. Each turn restores the block's shared memory.
inline void run_blocks(unsigned first, unsigned past, size_t bytes, const std::function<void()>& body) {
  blocks.resize(std::max<size_t>(blocks.size(), past - first));
  bool begun = false;
  for (unsigned ended = 0; ended < past - first; begun = true) {
    if (ended) fail("a barrier of the grid that some blocks do not reach");
    for (unsigned index = first; index < past; index++) {
      block = &blocks[index - first];
      blockIdx = {index, 0, 0};
      if (begun) {
        std::memcpy(shared_bytes, block->shared, bytes + GUARD);
        block->threads.go_on();
      } else {
        std::memset(shared_bytes, POISON, bytes + GUARD);
        block->threads.run(blockDim.x, body);
      }
      for (int i = 0; i < GUARD; i++)
        if (static_cast<unsigned char>(shared_bytes[bytes + i]) != POISON) fail("a write past the shared memory");
      ended += block->threads.ended();
      std::memcpy(block->shared, shared_bytes, bytes + GUARD);
    }
  }
}

}  // namespace cuda_on_cpu

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* launch, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_on_cpu;
  const dim3 grid = launch->gridDim, block = launch->blockDim;
  const size_t bytes = launch->dynamicSmemBytes;
  const bool cooperative = launch->numAttrs == 1 && launch->attrs->val.cooperative;
  if (grid.x == 0 || grid.y != 1 || grid.z != 1 || block.x == 0 || block.x % WARP || block.x > MAX_THREADS ||
      block.y != 1 || block.z != 1 || bytes > MAX_SHARED || (cooperative && (!holds_grids || grid.x > MULTIPROCESSORS)))
    return cudaErrorInvalidConfiguration;
  const std::lock_guard lock(one_launch);
  gridDim = grid;
  blockDim = block;
  together = cooperative;
  const std::function<void()> body = [&] { kernel(arguments...); };
  for (unsigned first = 0; first < grid.x; first = cooperative ? grid.x : first + 1)
    run_blocks(first, cooperative ? grid.x : first + 1, bytes, body);
  return cudaSuccess;
}
