// Shared code of the kernels without matrix instructions, which run on every GPU. A group of lanes processes one token,
// with 8 elements of a row per lane. A block processes GROUPS consecutive tokens on the last axis of a submap.
//
// VALUE_DIM is the head_dim of values, outputs and their gradients.
#pragma once

#include "problem.h"

namespace natten {

constexpr int THREADS = 128, ITEMS = 8;
__host__ __device__ constexpr int lanes_for(int dim) { return dim <= ITEMS ? 1 : 2 * lanes_for((dim + 1) / 2); }
constexpr int LANES = lanes_for(HEAD_DIM > VALUE_DIM ? HEAD_DIM : VALUE_DIM), GROUPS = THREADS / LANES;
static_assert(LANES <= 32, "head_dim must be at most 256");

__device__ __forceinline__ int group_of_thread() { return threadIdx.x / LANES; }
__device__ __forceinline__ int lane_of_group() { return threadIdx.x % LANES; }

// Elements per memory access to rows of DIM elements: a divisor of DIM, with at most 16 bytes.
__host__ __device__ constexpr int piece_of(int dim) {
  int piece = 16 / sizeof(Storage);
  while (dim % piece) piece /= 2;
  return piece;
}

// Loads or stores PIECE elements as float32.
template <int PIECE>
__device__ __forceinline__ void load_piece(const Storage* from, float* to) {
#if ELEMENT == 0
  if constexpr (PIECE == 4) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  } else if constexpr (PIECE == 2) {
    const float2 two = *reinterpret_cast<const float2*>(from);
    to[0] = two.x, to[1] = two.y;
  } else {
    to[0] = *from;
  }
#else
  if constexpr (PIECE == 1) {
    to[0] = Element::widen(*from);
  } else {
    unsigned words[PIECE / 2];
    if constexpr (PIECE == 8) {
      const uint4 four = *reinterpret_cast<const uint4*>(from);
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    } else if constexpr (PIECE == 4) {
      const uint2 two = *reinterpret_cast<const uint2*>(from);
      words[0] = two.x, words[1] = two.y;
    } else {
      words[0] = *reinterpret_cast<const unsigned*>(from);
    }
#pragma unroll
    for (int i = 0; i < PIECE; ++i) to[i] = i % 2 ? high_of(words[i / 2]) : low_of(words[i / 2]);
  }
#endif
}
template <int PIECE>
__device__ __forceinline__ void store_piece(const float* from, float factor, Storage* to) {
#if ELEMENT == 0
  if constexpr (PIECE == 4)
    *reinterpret_cast<float4*>(to) = {from[0] * factor, from[1] * factor, from[2] * factor, from[3] * factor};
  else if constexpr (PIECE == 2) *reinterpret_cast<float2*>(to) = {from[0] * factor, from[1] * factor};
  else *to = from[0] * factor;
#else
  if constexpr (PIECE == 1) {
    *to = Element::narrow(from[0] * factor);
  } else {
    unsigned words[PIECE / 2];
#pragma unroll
    for (int i = 0; i < PIECE / 2; ++i) words[i] = pack(from[2 * i] * factor, from[2 * i + 1] * factor);
    if constexpr (PIECE == 8) *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
    else if constexpr (PIECE == 4) *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
    else *reinterpret_cast<unsigned*>(to) = words[0];
  }
#endif
}

// This lane's part of a row of DIM elements, in float32.
template <int DIM>
struct Items {
  static constexpr int PIECE = piece_of(DIM);
  float x[ITEMS];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& item : x) item = 0;
  }
  __device__ __forceinline__ void load(const Storage* row) {
    const int first = lane_of_group() * ITEMS;
#pragma unroll
    for (int i = 0; i < ITEMS; i += PIECE) {
      if (first + i < DIM) {
        load_piece<PIECE>(row + first + i, x + i);
        continue;
      }
#pragma unroll
      for (int k = 0; k < PIECE; ++k) x[i + k] = 0;
    }
  }
  __device__ __forceinline__ void store(Storage* row, float factor) const {
    const int first = lane_of_group() * ITEMS;
#pragma unroll
    for (int i = 0; i < ITEMS; i += PIECE)
      if (first + i < DIM) store_piece<PIECE>(x + i, factor, row + first + i);
  }
  __device__ __forceinline__ void add(const Items& other, float factor) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) x[i] += factor * other.x[i];
  }
};
using QueryItems = Items<HEAD_DIM>;
using ValueItems = Items<VALUE_DIM>;

// The product of two rows, for all lanes of the group. All threads of the warp must call this.
template <int DIM>
__device__ __forceinline__ float dot(const Items<DIM>& a, const Items<DIM>& b) {
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
