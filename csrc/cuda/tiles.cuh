// What the kernels share: rows of a tile, the columns they meet, products, and which pairs are kept.
//
// A tile is SIDE sorted rows against SIDE sorted columns. Tiles do not align with clusters: a block's rows meet the
// columns from the first of its first row's cluster to the last of its last row's, so the grid depends on n alone.
#pragma once

#include <algorithm>
#include <type_traits>

#include "products.cuh"

// Its size is given at the launch, and is that of one struct for each kernel.
extern __shared__ __align__(128) char shared_bytes[];

namespace mcl {

template <class Shared>
__device__ __forceinline__ Shared& shared_memory() {
  asm volatile("// dynamic shared memory: %0" ::"n"(sizeof(Shared)));  // a comment: benchmarks/gpu_static.py reads it
  return *reinterpret_cast<Shared*>(shared_bytes);
}

// What a block without an opt-in may have on every architecture.
constexpr int MOST_SHARED = 48 * 1024;

// Sizes of a tile. fp64 is for checks: its tiles are smaller for its size alone.
template <class Operand>
struct Shape {
  static constexpr int SIDE = sizeof(Operand) == 8 ? 32 : 64;
  static constexpr int FEATURES = 128 / sizeof(Operand);  // of both sides that are multiplied at a time
  static constexpr int PADDING = 16 / sizeof(Operand);    // behind a row: neighbouring rows begin in other banks
  static constexpr int STRIDE = FEATURES + PADDING;
  static constexpr int PRODUCT_STRIDE = SIDE + 8;
};

template <class Operand>
struct Parts {
  alignas(32) Operand x[Shape<Operand>::SIDE][Shape<Operand>::STRIDE];
  alignas(32) Operand y[Shape<Operand>::SIDE][Shape<Operand>::STRIDE];
};

// The factors of products, and then the products.
template <class Operand>
union ProductMemory {
  Parts<Operand> parts;
  alignas(32) Sum<Operand> products[Shape<Operand>::SIDE][Shape<Operand>::PRODUCT_STRIDE];
};

// Where the rows and columns of a tile lie.
template <int SIDE>
struct Places {
  int64_t rows[SIDE], columns[SIDE];  // in the original order; -1 behind the last
  int64_t column_ids[SIDE];
};

// Features first .. first + FEATURES - 1 of the rows at `places`; zeros behind the last, and where there is no row.
// Of fp32 and fp64 less those of the offset, [D], where there is one.
template <int FEATURES, int THREADS, class Operand, int STRIDE>
__device__ __forceinline__ void load_part(const Matrix& x, const int64_t* places, int64_t first, int64_t width,
                                          Operand (*to)[STRIDE], const Sum<Operand>* offset = nullptr) {
  constexpr int LANES = 16 / sizeof(Operand), VECTORS = FEATURES / LANES;
#pragma unroll
  for (int index = threadIdx.x; index < Shape<Operand>::SIDE * VECTORS; index += THREADS) {
    const int row = index / VECTORS, lane = index % VECTORS * LANES;
    const int64_t place = places[row], feature = first + lane;
    Vector<Operand, LANES> vector;
    if (place >= 0 && x.in_vectors && feature + LANES <= width) {
      vector = load<LANES>(static_cast<const Operand*>(x.data) + place * x.row_stride + feature);
    } else {
#pragma unroll
      for (int k = 0; k < LANES; k++)
        vector.lanes[k] = place >= 0 && feature + k < width
                              ? read<Operand>(x, place * x.row_stride + (feature + k) * x.step)
                              : rounded<Operand>(Sum<Operand>(0));
    }
    if constexpr (std::is_same_v<Operand, Sum<Operand>>) {
      if (offset && place >= 0) {
#pragma unroll
        for (int k = 0; k < LANES; k++)
          if (feature + k < width) vector.lanes[k] -= offset[feature + k];
      }
    }
    *reinterpret_cast<Vector<Operand, LANES>*>(&to[row][lane]) = vector;
  }
}

// <x_i, y_j> of the tile into shared memory, which every thread may read when this returns.
template <class Operand, int THREADS>
__device__ __forceinline__ void multiply_tile(const Pairs<Sum<Operand>>& pairs, const Places<Shape<Operand>::SIDE>& at,
                                              ProductMemory<Operand>& memory) {
  using S = Shape<Operand>;
  Products<Operand, S::SIDE, THREADS> products;
  products.clear();
  for (int64_t first = 0; first < pairs.width; first += S::FEATURES) {
    load_part<S::FEATURES, THREADS>(pairs.rows.x, at.rows, first, pairs.width, memory.parts.x);
    load_part<S::FEATURES, THREADS>(pairs.columns.y, at.columns, first, pairs.width, memory.parts.y);
    __syncthreads();
    products.template add<S::FEATURES, Layout::rows_are_columns>(memory.parts.x[0], S::STRIDE, memory.parts.y[0],
                                                                 S::STRIDE);
    __syncthreads();
  }
  products.store(memory.products[0], S::PRODUCT_STRIDE);
  __syncthreads();
}

// A row of the tile, which `TEAM` neighbouring threads share.
struct Row {
  int64_t place;             // in the original order, -1 behind the last
  int64_t id;                // where ids are compared
  int begin, end;            // the sorted columns it meets
  int drop_begin, drop_end;  // and those among them it drops

  __device__ __forceinline__ bool meets() const { return begin < end; }
  __device__ __forceinline__ bool keeps(int column) const {
    return column >= begin && column < end && !(column >= drop_begin && column < drop_end);
  }
};

__device__ __forceinline__ Row load_row(const Rows& rows, int sorted) {
  if (sorted >= rows.n) return {-1, 0, 0, 0, 0, 0};
  Row row{rows.order[sorted], 0, int(rows.begin[sorted]), int(rows.end[sorted]), 0, 0};
  if (rows.drop_begin) {
    row.drop_begin = rows.drop_begin[sorted];
    row.drop_end = rows.drop_end[sorted];
  }
  if (rows.ids) row.id = rows.ids[row.place];
  return row;
}

// The largest value of all threads of the block.
template <int THREADS>
__device__ __forceinline__ int block_maximum(int value, int* of_warps) {
#pragma unroll
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) value = max(value, __shfl_xor_sync(0xffffffff, value, lanes));
  if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = value;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < THREADS / WARP; warp++) value = max(value, of_warps[warp]);
  __syncthreads();
  return value;
}

// The columns that any row of the block meets, from the first to the last, in tiles of SIDE; but for a hole of whole
// tiles that every row drops.
struct Span {
  int first, last, hole_begin, hole_end;

  // The first column of the tile at or behind `start`.
  __device__ __forceinline__ int tile_at(int start) const { return start == hole_begin ? hole_end : start; }
};

template <int SIDE, int THREADS>
__device__ __forceinline__ Span find_span(const Row& row, bool skips_tiles, int* of_warps) {
  constexpr int NONE = 0x7fffffff;
  Span span{-block_maximum<THREADS>(row.meets() ? -row.begin : -NONE, of_warps),
            block_maximum<THREADS>(row.meets() ? row.end : 0, of_warps), NONE, NONE};
  if (!skips_tiles) return span;
  const int drop_first = block_maximum<THREADS>(row.meets() ? row.drop_begin : 0, of_warps);
  const int drop_last = -block_maximum<THREADS>(row.meets() ? -row.drop_end : -NONE, of_warps);
  if (span.first >= span.last || drop_first >= drop_last) return span;
  const int begin = span.first + (drop_first - span.first + SIDE - 1) / SIDE * SIDE;
  // The last tile counts as whole, too.
  const int to_hole = drop_last < span.last ? drop_last - span.first : span.last - span.first + SIDE - 1;
  const int end = span.first + to_hole / SIDE * SIDE;
  if (begin < end) span.hole_begin = begin, span.hole_end = end;
  return span;
}

// Places of the tile's columns; `at` may be written when no thread reads that of the tile before.
template <int SIDE>
__device__ __forceinline__ void load_columns(const Columns& columns, int start, int last, Places<SIDE>& at) {
  if (threadIdx.x >= SIDE) return;
  const int sorted = start + threadIdx.x;
  const int64_t place = sorted < last ? columns.order[sorted] : -1;
  at.columns[threadIdx.x] = place;
  if (columns.ids) at.column_ids[threadIdx.x] = place < 0 ? 0 : columns.ids[place];
}

// visit(column, product, kept) for each of the columns of a tile that are this thread's; `column` is relative to it.
template <class Operand, int TEAM, class Visit>
__device__ __forceinline__ void for_each_product(const Row& row, int start, bool compares_ids,
                                                 const Places<Shape<Operand>::SIDE>& at,
                                                 const ProductMemory<Operand>& memory, Visit visit) {
  using S = Shape<Operand>;
  constexpr int LANES = 4;
  const int of_tile = threadIdx.x / TEAM;
  for (int first = threadIdx.x % TEAM * LANES; first < S::SIDE; first += TEAM * LANES) {
    const auto products = load<LANES>(&memory.products[of_tile][first]);
#pragma unroll
    for (int k = 0; k < LANES; k++) {
      const int column = first + k;
      const bool kept = row.keeps(start + column) && !(compares_ids && row.id == at.column_ids[column]);
      visit(column, products.lanes[k], kept);
    }
  }
}

struct NoMemory {};

// Of a kernel whose shared memory is one struct; an empty one is none.
template <class Shared, class Problem>
cudaError_t launch(void (*kernel)(Problem), int64_t blocks, int threads, const Problem& problem, cudaStream_t stream,
                   bool together = false) {
  static_assert(sizeof(Shared) <= MOST_SHARED);
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim.x = unsigned(blocks);
  launch.blockDim.x = threads;
  launch.dynamicSmemBytes = std::is_empty_v<Shared> ? 0 : sizeof(Shared);
  launch.stream = stream;
  launch.attrs = &cooperative;
  launch.numAttrs = together ? 1 : 0;
  return cudaLaunchKernelEx(&launch, kernel, problem);
}

// Of the current device; 0 where it cannot be told.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) == cudaSuccess) (void)cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// As many of the blocks as the device holds at once, which may wait for one another.
template <class Shared, class Problem>
cudaError_t launch_together(void (*kernel)(Problem), int64_t blocks, int threads, const Problem& problem,
                            cudaStream_t stream) {
  int resident = 0;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, sizeof(Shared));
  if (error != cudaSuccess) return error;
  const int64_t most = int64_t(device_attribute(cudaDevAttrMultiProcessorCount)) * resident;
  return launch<Shared>(kernel, std::min(blocks, most), threads, problem, stream, true);
}

}  // namespace mcl
