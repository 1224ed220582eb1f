// Shared code of the kernels without matrix instructions, which run on every GPU. A group of lanes processes one token,
// with 8 elements of a row per lane. A block processes GROUPS consecutive tokens on the last axis of a submap.
#pragma once

#include "problem.h"

namespace natten {

constexpr int THREADS = 128, ITEMS = 8;
__host__ __device__ constexpr int lanes_for(int dim) { return dim <= ITEMS ? 1 : 2 * lanes_for((dim + 1) / 2); }
constexpr int LANES = lanes_for(HEAD_DIM), GROUPS = THREADS / LANES;
static_assert(HEAD_DIM % ITEMS == 0 && LANES <= 32, "head_dim must be a multiple of 8 up to 256");

__device__ __forceinline__ int group_of_thread() { return threadIdx.x / LANES; }
__device__ __forceinline__ int lane_of_group() { return threadIdx.x % LANES; }

// This lane's part of a row, in float32.
struct Items {
  float x[ITEMS];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& item : x) item = 0;
  }
  __device__ __forceinline__ void load(const Storage* row) {
    const int first = lane_of_group() * ITEMS;
    if (first >= HEAD_DIM) return clear();
#if ELEMENT == 0
    const float4 low = *reinterpret_cast<const float4*>(row + first);
    const float4 high = *reinterpret_cast<const float4*>(row + first + 4);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w, x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
#else
    const uint4 words = *reinterpret_cast<const uint4*>(row + first);
    x[0] = low_of(words.x), x[1] = high_of(words.x), x[2] = low_of(words.y), x[3] = high_of(words.y);
    x[4] = low_of(words.z), x[5] = high_of(words.z), x[6] = low_of(words.w), x[7] = high_of(words.w);
#endif
  }
  __device__ __forceinline__ void store(Storage* row, float factor) const {
    const int first = lane_of_group() * ITEMS;
    if (first >= HEAD_DIM) return;
#if ELEMENT == 0
    *reinterpret_cast<float4*>(row + first) = {x[0] * factor, x[1] * factor, x[2] * factor, x[3] * factor};
    *reinterpret_cast<float4*>(row + first + 4) = {x[4] * factor, x[5] * factor, x[6] * factor, x[7] * factor};
#else
    *reinterpret_cast<uint4*>(row + first) = {pack(x[0] * factor, x[1] * factor), pack(x[2] * factor, x[3] * factor),
                                              pack(x[4] * factor, x[5] * factor), pack(x[6] * factor, x[7] * factor)};
#endif
  }
  __device__ __forceinline__ void add(const Items& other, float factor) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) x[i] += factor * other.x[i];
  }
};

// The product of two rows, for all lanes of the group. All threads of the warp must call this.
__device__ __forceinline__ float dot(const Items& a, const Items& b) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) sum += a.x[i] * b.x[i];
#pragma unroll
  for (int mask = LANES / 2; mask; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  return sum;
}

__device__ __forceinline__ int largest_in_warp(int value) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) value = max(value, __shfl_xor_sync(~0u, value, mask));
  return value;
}

// The row of a head's bias table for a key and a query at these positions on the first two axes.
__device__ __forceinline__ const float* bias_row(const Params& p, int head, int key_z, int key_y, int z, int y) {
  if (!HAS_RPB) return nullptr;
  return p.rpb + head * static_cast<long long>(TABLE) +
         ((key_z - z + KERNEL_Z - 1) * TABLE_Y + key_y - y + KERNEL_Y - 1) * TABLE_X;
}

// The token of this group: its position, and its window on each axis.
struct Token {
  Submap map;
  int z, y, x;     // groups after the last token use that token
  int first_x;     // x of the first group
  bool is_there;
  Span keys_z, keys_y, keys_x;
  int start_z, start_y, start_x;

  // Returns false, for all groups, if the piece is empty.
  __device__ __forceinline__ bool locate(const Params& p, int piece, int head) {
    int at[3];
    map.head = head;
    if (!natten::locate(p, piece, {1, 1, GROUPS}, map, at)) return false;
    z = at[0], y = at[1], first_x = at[2], x = first_x + group_of_thread();
    is_there = x < map.n[2];
    x = min(x, map.n[2] - 1);
    start_z = WindowsZ::start(z, map.n[0]), start_y = WindowsY::start(y, map.n[1]), start_x = WindowsX::start(x, map.n[2]);
    keys_z = WindowsZ::keys(z, map.n[0]), keys_y = WindowsY::keys(y, map.n[1]), keys_x = WindowsX::keys(x, map.n[2]);
    return true;
  }
};

// The gradient of rpb that a block sums, in shared memory if it fits. Each entry belongs to one thread.
class TableGradient {
 public:
  static constexpr int SHARED = TABLE <= 4096 ? TABLE : 1;

  __device__ __forceinline__ TableGradient(const Params& p, int head, int part, float* shared)
      : out_(p.partial_rpb + (head * static_cast<long long>(p.parts) + part) * TABLE),
        sums_(TABLE <= 4096 ? shared : out_) {
    for (int i = threadIdx.x; i < TABLE; i += THREADS) sums_[i] = 0;
    __syncthreads();
  }
  // Adds value(group, entry) of all groups to each entry of a table row. `entry` is an index on the last axis.
  template <class Value>
  __device__ __forceinline__ void add_row(int row_z, int row_y, Value value) {
    for (int i = threadIdx.x; i < TABLE_X; i += THREADS) {
      float sum = 0;
      for (int group = 0; group < GROUPS; ++group) sum += value(group, i);
      sums_[(row_z * TABLE_Y + row_y) * TABLE_X + i] += sum;
    }
  }
  __device__ __forceinline__ void finish() {
    __syncthreads();
    if (TABLE <= 4096)
      for (int i = threadIdx.x; i < TABLE; i += THREADS) out_[i] = sums_[i];
  }

 private:
  float *out_, *sums_;
};

}  // namespace natten
