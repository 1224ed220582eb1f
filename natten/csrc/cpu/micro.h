// The three products of attention, on blocks that fit into registers. All other files move data to them.
//
// Weights and logits of W queries are adjacent: s[key * W + lane]. A "row" is such a vector of queries. The kernels process
// several rows with the same keys, so that each load is used several times.
//
//   dot      s[r][key][lane]  = bias + sum over d of  q[r][d][lane] * k[key][d]     logits, and gradients of weights
//   gather   out[r][d]       += sum over keys of  s[r][key] * v[key][d]             output, gradient of queries
//   scatter  grad[key][d]    += sum over rows of  s[r][key] * q[r][d]               gradients of keys and values
#pragma once

#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace natten {

constexpr int MAX_ROWS = REGISTERS >= 32 ? 7 : 4;
constexpr int DOT_BUDGET = REGISTERS >= 32 ? 24 : 12;  // accumulators of dot
constexpr int MAX_DOT_KEYS = REGISTERS >= 32 ? 8 : 6;
constexpr int SCATTER_KEYS = REGISTERS >= 32 ? 7 : 5;  // keys of scatter, two accumulators each

// Rows at equal distances, in floats.
template <class T>
struct Strided {
  T* first;
  int64_t stride;
  NATTEN_INLINE T* operator[](int64_t i) const { return first + i * stride; }
};
using Rows = Strided<float>;
using ConstRows = Strided<const float>;

// Calls function(integral_constant<int, n>), for n in 1 .. MAX.
template <int MAX, class Function>
NATTEN_INLINE void with_constant(int n, const Function& function) {
  if constexpr (MAX > 1)
    if (n < MAX) return with_constant<MAX - 1>(n, function);
  function(std::integral_constant<int, MAX>{});
}

// Calls function(first, size) for the fewest blocks of nearly equal size, of at most `most`.
template <class Function>
NATTEN_INLINE void for_each_part(int count, int most, const Function& function) {
  int parts = (count + most - 1) / most;
  for (int first = 0; parts > 0; --parts) {
    const int size = (count - first + parts - 1) / parts;
    function(first, size);
    first += size;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// dot
// ---------------------------------------------------------------------------------------------------------------------

constexpr int dot_keys(int rows) {
  const int keys = DOT_BUDGET / rows;
  return keys > MAX_DOT_KEYS ? MAX_DOT_KEYS : keys;
}

// How dot finds the key of each lane. Keys are transposed, k[d][position], except for SHARED, k[position][d].
enum KeyAccess {
  SHIFTED,   // the lanes have consecutive keys
  PERMUTED,  // the keys are within W positions, given by an index vector
  SHARED,    // all lanes have the same key
};

struct DotArguments {
  int dim;
  ConstRows q;     // [rows][dim][W]
  ConstRows k;     // begins with the first key of the first lane
  IntVec index;    // for PERMUTED
  ConstRows bias;  // [rows][keys][W]
  Rows s;          // [rows][keys][W]
};

constexpr int DOT_PIECE = 64;  // elements of d that are summed separately, for precision

template <int ROWS, int KEYS, KeyAccess ACCESS>
void dot(const DotArguments& a, int first_key) {
  const int64_t k_stride = a.k.stride, q_stride = a.q.stride;
  const IntVec index = a.index;
  for (int begin = 0; begin < a.dim; begin += DOT_PIECE) {
    const ConstRows start = begin ? ConstRows{a.s.first, a.s.stride} : a.bias;
    const float* k = ACCESS == SHARED ? a.k[first_key] + begin : a.k.first + first_key + begin * k_stride;
    const float* q = a.q.first + begin * W;
    const int size = a.dim - begin < DOT_PIECE ? a.dim - begin : DOT_PIECE;
    Vec sum[ROWS][KEYS] = {};
    for (int d = 0; d < size; ++d) {
      Vec key[KEYS];
#pragma GCC unroll 8
      for (int j = 0; j < KEYS; ++j) {
        if constexpr (ACCESS == SHARED) key[j] = broadcast(k[j * k_stride + d]);
        else if constexpr (ACCESS == SHIFTED) key[j] = load(k + d * k_stride + j);
        else key[j] = permute(load(k + d * k_stride + j), index);
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const Vec query = load(q + r * q_stride + d * W);
#pragma GCC unroll 8
        for (int j = 0; j < KEYS; ++j) sum[r][j] += query * key[j];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < KEYS; ++j)
        store(a.s[r] + (first_key + j) * W, load(start[r] + (first_key + j) * W) + sum[r][j]);
  }
}

// dot over any number of rows and keys.
template <KeyAccess ACCESS>
inline void dot_rows(const DotArguments& a, int rows, int keys) {
  with_constant<MAX_ROWS>(rows, [&](auto row_count) {
    constexpr int ROWS = row_count, MOST = dot_keys(ROWS);
    for_each_part(keys, MOST, [&](int first, int size) {
      with_constant<MOST>(size, [&](auto key_count) { dot<ROWS, key_count, ACCESS>(a, first); });
    });
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// gather
// ---------------------------------------------------------------------------------------------------------------------

// For VECS vectors of d: out[r] += sum over j < keys of s[r][j * W] * v[j].
template <int ROWS, int VECS>
NATTEN_INLINE void gather(int keys, ConstRows s, ConstRows v, Rows out) {
  Vec sum[ROWS][VECS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < VECS; ++i) sum[r][i] = load(out[r] + i * W);
  const float *weight = s.first, *value = v.first;
  for (int j = 0; j < keys; ++j) {
    Vec x[VECS];
#pragma GCC unroll 2
    for (int i = 0; i < VECS; ++i) x[i] = load(value + i * W);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Vec w = broadcast(weight[r * s.stride]);
#pragma GCC unroll 2
      for (int i = 0; i < VECS; ++i) sum[r][i] += w * x[i];
    }
    weight += W, value += v.stride;
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < VECS; ++i) store(out[r] + i * W, sum[r][i]);
}

// Calls function(d, integral_constant<int, vectors>) for pieces of one or two vectors that make up `padded` floats.
template <class Function>
NATTEN_INLINE void for_each_piece(int padded, const Function& function) {
  int d = 0;
  for (; d + 2 * W <= padded; d += 2 * W) function(d, std::integral_constant<int, 2>{});
  if (d < padded) function(d, std::integral_constant<int, 1>{});
}

// ---------------------------------------------------------------------------------------------------------------------
// scatter
// ---------------------------------------------------------------------------------------------------------------------

// For KEYS keys and VECS vectors of d: grad[j] += sum over r < rows of s[r][j * W] * q[r].
template <int KEYS, int VECS>
NATTEN_INLINE void scatter(int rows, ConstRows s, ConstRows q, Rows grad) {
  Vec sum[KEYS][VECS];
#pragma GCC unroll 8
  for (int j = 0; j < KEYS; ++j)
#pragma GCC unroll 2
    for (int i = 0; i < VECS; ++i) sum[j][i] = load(grad[j] + i * W);
  const float *weight = s.first, *query = q.first;
  for (int r = 0; r < rows; ++r) {
    Vec x[VECS];
#pragma GCC unroll 2
    for (int i = 0; i < VECS; ++i) x[i] = load(query + i * W);
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; ++j) {
      const Vec w = broadcast(weight[j * W]);
#pragma GCC unroll 2
      for (int i = 0; i < VECS; ++i) sum[j][i] += w * x[i];
    }
    weight += s.stride, query += q.stride;
  }
#pragma GCC unroll 8
  for (int j = 0; j < KEYS; ++j)
#pragma GCC unroll 2
    for (int i = 0; i < VECS; ++i) store(grad[j] + i * W, sum[j][i]);
}

}  // namespace natten
