// Steps that the kernels share: loading rows and columns of a tile, products, and the mask of kept pairs.
//
// A tile is EDGE sorted rows against EDGE sorted columns. Tiles do not align with clusters: the rows of a tile are
// compared with all columns from the first one of the first row's cluster to the last one of the last row's.
#pragma once

#include <algorithm>
#include <type_traits>

#include "masked_lse_problem.h"
#include "products.cuh"

// Each kernel's shared memory is one struct, whose size is given at the launch.
extern __shared__ __align__(128) char shared_bytes[];

namespace mcl {

template <class Shared>
__device__ __forceinline__ Shared& shared_memory() {
  asm volatile("// dynamic shared memory: %0" ::"n"(sizeof(Shared)));  // for benchmarks/gpu/compiled.py
  return *reinterpret_cast<Shared*>(shared_bytes);
}

// Bytes of shared memory available to a block on every architecture without an opt-in.
constexpr int MAX_SHARED = 48 * 1024;

// Sizes of a tile. Tiles of fp64, which is for checks, are smaller to fit the shared memory.
template <class Operand>
struct Shape {
  static constexpr int EDGE = sizeof(Operand) == 8 ? 32 : 64;
  static constexpr int FEATURES = 128 / sizeof(Operand);  // loaded and multiplied at a time
  static constexpr int PADDING = 16 / sizeof(Operand);    // after a row: adjacent rows start in different banks
  static constexpr int STRIDE = FEATURES + PADDING;
  static constexpr int PRODUCT_STRIDE = EDGE + 8;
};

template <class Operand>
struct Parts {
  alignas(32) Operand x[Shape<Operand>::EDGE][Shape<Operand>::STRIDE];
  alignas(32) Operand y[Shape<Operand>::EDGE][Shape<Operand>::STRIDE];
};

// The factors of products, later the products.
template <class Operand>
union ProductMemory {
  Parts<Operand> parts;
  alignas(32) Sum<Operand> products[Shape<Operand>::EDGE][Shape<Operand>::PRODUCT_STRIDE];
};

// Original indices of the rows and columns of a tile; -1 past the last.
template <int EDGE>
struct TileIndices {
  int64_t rows[EDGE], columns[EDGE];
  int64_t column_ids[EDGE];
};

// Loads features first .. first + FEATURES - 1 of the rows with indices `originals`; zeros past the last feature, and
// for index -1. Subtracts the offset, [D], if given, from fp32 and fp64 rows.
template <int FEATURES, int THREADS, class Operand, int STRIDE>
__device__ __forceinline__ void load_part(const Matrix& x, const int64_t* originals, int64_t first, int64_t width,
                                          Operand (*to)[STRIDE], const Sum<Operand>* offset = nullptr) {
  constexpr int LANES = 16 / sizeof(Operand), VECTORS = FEATURES / LANES;
#pragma unroll
  for (int index = threadIdx.x; index < Shape<Operand>::EDGE * VECTORS; index += THREADS) {
    const int row = index / VECTORS, lane = index % VECTORS * LANES;
    const int64_t original = originals[row], feature = first + lane;
    Vector<Operand, LANES> vector;
    if (original >= 0 && x.in_vectors && feature + LANES <= width) {
      vector = load<LANES>(static_cast<const Operand*>(x.data) + original * x.row_stride + feature);
    } else {
#pragma unroll
      for (int k = 0; k < LANES; k++)
        vector.lanes[k] = original >= 0 && feature + k < width
                              ? read<Operand>(x, original * x.row_stride + (feature + k) * x.step)
                              : rounded<Operand>(Sum<Operand>(0));
    }
    if constexpr (std::is_same_v<Operand, Sum<Operand>>) {
      if (offset && original >= 0) {
#pragma unroll
        for (int k = 0; k < LANES; k++)
          if (feature + k < width) vector.lanes[k] -= offset[feature + k];
      }
    }
    *reinterpret_cast<Vector<Operand, LANES>*>(&to[row][lane]) = vector;
  }
}

// Computes <x_i, y_j> of the tile in shared memory. Ends with a barrier, so that every thread may read it.
template <class Operand, int THREADS>
__device__ __forceinline__ void multiply_tile(const Pairs<Sum<Operand>>& pairs,
                                              const TileIndices<Shape<Operand>::EDGE>& indices,
                                              ProductMemory<Operand>& memory) {
  using S = Shape<Operand>;
  Products<Operand, S::EDGE, THREADS> products;
  products.clear();
  for (int64_t first = 0; first < pairs.width; first += S::FEATURES) {
    load_part<S::FEATURES, THREADS>(pairs.rows.x, indices.rows, first, pairs.width, memory.parts.x);
    load_part<S::FEATURES, THREADS>(pairs.columns.y, indices.columns, first, pairs.width, memory.parts.y);
    __syncthreads();
    products.template add<S::FEATURES, Layout::rows_are_columns>(memory.parts.x[0], S::STRIDE, memory.parts.y[0],
                                                                 S::STRIDE);
    __syncthreads();
  }
  products.store(memory.products[0], S::PRODUCT_STRIDE);
  __syncthreads();
}

// A row of the tile, shared by TEAM adjacent threads.
struct Row {
  int64_t original;          // original index, -1 past the last row
  int64_t id;                // if ids are compared
  int begin, end;            // the sorted columns that it is compared with
  int drop_begin, drop_end;  // the columns among them that it drops

  __device__ __forceinline__ bool has_columns() const { return begin < end; }
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
  if (rows.ids) row.id = rows.ids[row.original];
  return row;
}

// Loads the indices of the tile's columns. No thread may still be reading the previous tile's.
template <int EDGE>
__device__ __forceinline__ void load_columns(const Columns& columns, int start, int last, TileIndices<EDGE>& indices) {
  if (threadIdx.x >= EDGE) return;
  const int sorted = start + threadIdx.x;
  const int64_t original = sorted < last ? columns.order[sorted] : -1;
  indices.columns[threadIdx.x] = original;
  if (columns.ids) indices.column_ids[threadIdx.x] = original < 0 ? 0 : columns.ids[original];
}

// Calls visit(column, product, kept) for each column of the tile that belongs to this thread; `column` is relative to
// the tile.
template <class Operand, int TEAM, class Visit>
__device__ __forceinline__ void for_each_product(const Row& row, int start, bool compares_ids,
                                                 const TileIndices<Shape<Operand>::EDGE>& indices,
                                                 const ProductMemory<Operand>& memory, Visit visit) {
  using S = Shape<Operand>;
  constexpr int LANES = 4;
  const int tile_row = threadIdx.x / TEAM;
  for (int first = threadIdx.x % TEAM * LANES; first < S::EDGE; first += TEAM * LANES) {
    const auto products = load<LANES>(&memory.products[tile_row][first]);
#pragma unroll
    for (int k = 0; k < LANES; k++) {
      const int column = first + k;
      const bool kept = row.keeps(start + column) && !(compares_ids && row.id == indices.column_ids[column]);
      visit(column, products.lanes[k], kept);
    }
  }
}

// The first of the integers begin .. end - 1 for which `found` holds, as it does for all after it; or end.
template <class Found>
__device__ __forceinline__ int first_where(int begin, int end, Found found) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (found(middle))
      end = middle;
    else
      begin = middle + 1;
  }
  return begin;
}

struct NoMemory {};

// Launches a kernel whose shared memory is the struct `Shared`. `cooperative`: all blocks are resident at once.
template <class Shared, class Problem>
cudaError_t launch(void (*kernel)(Problem), int64_t blocks, int threads, const Problem& problem, cudaStream_t stream,
                   bool cooperative = false) {
  static_assert(sizeof(Shared) <= MAX_SHARED);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim.x = unsigned(blocks);
  launch.blockDim.x = threads;
  launch.dynamicSmemBytes = std::is_empty_v<Shared> ? 0 : sizeof(Shared);
  launch.stream = stream;
  launch.attrs = &attribute;
  launch.numAttrs = cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&launch, kernel, problem);
}

// An attribute of the current device; 0 if it cannot be read.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) == cudaSuccess) (void)cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Finds the number of blocks of a kernel that the device holds at once.
template <class Shared, class Problem>
cudaError_t find_resident(void (*kernel)(Problem), int threads, int64_t* blocks) {
  int resident = 0;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, sizeof(Shared));
  *blocks = int64_t(device_attribute(cudaDevAttrMultiProcessorCount)) * resident;
  return error;
}

// Launches as many of the blocks as the device holds at once, so that they may wait for one another.
template <class Shared, class Problem>
cudaError_t launch_resident(void (*kernel)(Problem), int64_t blocks, int threads, const Problem& problem,
                            cudaStream_t stream) {
  int64_t resident = 0;
  const cudaError_t error = find_resident<Shared>(kernel, threads, &resident);
  if (error != cudaSuccess) return error;
  return launch<Shared>(kernel, std::min(blocks, resident), threads, problem, stream, true);
}

}  // namespace mcl
