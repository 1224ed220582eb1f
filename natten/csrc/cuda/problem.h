// The description of a problem, for all kernels. Compile-time parameters, defined by natten/backends/cuda: the window of
// each axis (KERNEL_Z.., STRIDE_Z.., CAUSAL_Z..), HEAD_DIM and, for values, VALUE_DIM, ELEMENT, HAS_RPB, and HAS_LONG_STEPS,
// whether 32 steps between neighbors in a residue class may overflow an int of bytes. Run-time parameters: `Params`.
//
// Problems with fewer than three axes have leading axes of one token and a window of one. Dilation cuts each axis into
// residue classes, which are small problems without dilation. natten/geometry is the same definition in Python.
#pragma once

#include "instructions.h"

namespace natten {

// The order of _TENSORS in natten/backends/cuda.
enum TensorName {
  QUERY, KEY, VALUE, OUT, LSE, ATTN, GRAD_OUT, GRAD_LSE, GRAD_ATTN, GRAD_QUERY, GRAD_KEY, GRAD_VALUE, DELTA, TENSORS
};

// [batch, axis 0, axis 1, axis 2, heads, items], items contiguous; strides in elements.
struct TensorView {
  char* data;
  long long batch, axis[3], head;
  int group, unused;  // how many heads of the problem share a head of the tensor
};

struct Params {
  TensorView tensors[TENSORS];
  const float* rpb;    // [heads, 2K - 1 of each axis], contiguous; or null
  float* partial_rpb;  // [heads, parts, 2K - 1 of each axis], the contribution of each part to grad_rpb; or null
  float* grad_rpb;     // [heads, 2K - 1 of each axis]; or null
  int pieces;          // tiles per head, over all images and residue classes
  int parts;           // blocks that share the pieces of a head, if rpb has a gradient
  int heads, dilation[3];
  int tokens[3], longer[3];  // tokens per residue class along each axis, and how many classes have one more
  int cuts[3];               // pieces per residue class along each axis
  float scale;
};

constexpr int TABLE_Z = 2 * KERNEL_Z - 1, TABLE_Y = 2 * KERNEL_Y - 1, TABLE_X = 2 * KERNEL_X - 1;
constexpr int TABLE = TABLE_Z * TABLE_Y * TABLE_X;
constexpr int WINDOW = KERNEL_Z * KERNEL_Y * KERNEL_X;
constexpr int RANK = KERNEL_Z > 1 ? 3 : KERNEL_Y > 1 ? 2 : 1;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

struct Span {
  int first, end;
  __device__ __forceinline__ bool holds(int i) const {
    return static_cast<unsigned>(i - first) < static_cast<unsigned>(end - first);
  }
};

// Windows along one axis of a residue class of n tokens: DiNAT's equations 1 and 2 (arXiv:2209.15001), with strides.
template <int K, int STRIDE, bool IS_CAUSAL>
struct Windows {
  // First key of the window of a query; negative where a causal window begins before the map.
  static __device__ __forceinline__ int start(int s, int n) {
    const int group = s / STRIDE * STRIDE;
    if (IS_CAUSAL) return min(group + STRIDE - 1, n - 1) - (K - 1);
    return min(max(min(group + STRIDE / 2, n - 1) - K / 2, 0), n - K);
  }
  static __device__ __forceinline__ int end(int s, int n) { return IS_CAUSAL ? s + 1 : start(s, n) + K; }
  static __device__ __forceinline__ Span keys(int s, int n) { return {max(start(s, n), 0), end(s, n)}; }

  // The queries whose windows contain a key. They are an interval, because both ends of the window are monotonic.
  static __device__ __forceinline__ Span queries(int key, int n) {
    int first, last_group;
    if (IS_CAUSAL) {
      first = key;
      if (key + K - 1 >= n - 1) return {first, n};
      last_group = key + K - STRIDE;
    } else {
      const int leader = key - (K - 1) + K / 2 - STRIDE / 2;
      first = key < K ? 0 : max((leader + STRIDE - 1) / STRIDE * STRIDE, 0);
      if (key >= n - K) return {first, n};
      last_group = key + K / 2 - STRIDE / 2;
    }
    return {first, min(last_group / STRIDE * STRIDE + STRIDE, n)};
  }
};
using WindowsZ = Windows<KERNEL_Z, STRIDE_Z, CAUSAL_Z>;
using WindowsY = Windows<KERNEL_Y, STRIDE_Y, CAUSAL_Y>;
using WindowsX = Windows<KERNEL_X, STRIDE_X, CAUSAL_X>;

// Row-major index of a slot in a window.
__device__ __forceinline__ int slot_index(int slot_z, int slot_y, int slot_x) {
  return (slot_z * KERNEL_Y + slot_y) * KERNEL_X + slot_x;
}

// One image, head and residue class.
struct Submap {
  int batch, head, residue[3], n[3];
};

// Removes and returns the next digit of a mixed-radix number.
__device__ __forceinline__ int take(unsigned& index, int radix) {
  if (radix == 1) return 0;
  const unsigned rest = index / static_cast<unsigned>(radix), digit = index - rest * radix;
  index = rest;
  return static_cast<int>(digit);
}

// Finds piece `index` of a head, for pieces of the given size. Sets the submap, and `at` to its first token. Returns false
// if the piece is outside the submap, because the residue class is shorter than others.
__device__ __forceinline__ bool locate(const Params& p, unsigned index, const int (&size)[3], Submap& map, int (&at)[3]) {
#pragma unroll
  for (int i = 2; i >= 0; --i) {
    at[i] = map.residue[i] = 0, map.n[i] = 1;
    if (i < 3 - RANK) continue;  // an unused axis
    at[i] = take(index, p.cuts[i]) * size[i];
    map.residue[i] = take(index, p.dilation[i]);
    map.n[i] = p.tokens[i] + (map.residue[i] < p.longer[i]);
  }
  map.batch = static_cast<int>(index);
  return at[0] < map.n[0] && at[1] < map.n[1] && at[2] < map.n[2];
}

// Address of the first row of a tensor in a submap.
__device__ __forceinline__ char* base_of(const TensorView& view, const Submap& map, int element_bytes) {
  long long offset = map.batch * view.batch + map.head / view.group * view.head;
#pragma unroll
  for (int i = 3 - RANK; i < 3; ++i) offset += map.residue[i] * view.axis[i];
  return view.data + offset * element_bytes;
}

// A tensor in a submap: one row of elements per token.
#if HAS_LONG_STEPS
using Step = long long;
#else
using Step = int;
#endif
template <class T>
struct Rows {
  char* base;
  Step step[3];  // bytes

  __device__ __forceinline__ Rows(const Params& p, TensorName name, char* base) : base(base) {
#pragma unroll
    for (int i = 0; i < 3; ++i) step[i] = static_cast<Step>(p.dilation[i] * p.tensors[name].axis[i] * sizeof(T));
  }
  __device__ __forceinline__ Rows(const Params& p, TensorName name, const Submap& map)
      : Rows(p, name, base_of(p.tensors[name], map, sizeof(T))) {}
  __device__ __forceinline__ T* at(int z, int y, int x) const {
    using Offset = long long;
    return reinterpret_cast<T*>(base + Offset(z) * step[0] + Offset(y) * step[1] + Offset(x) * step[2]);
  }
};

// The pieces [first, end) of a head that a block processes, if blocks share them to sum the gradient of rpb.
__device__ __forceinline__ void share_of(const Params& p, int part, int& first, int& end) {
  const long long pieces = p.pieces;
  first = static_cast<int>(pieces * part / p.parts);
  end = static_cast<int>(pieces * (part + 1) / p.parts);
}

}  // namespace natten
