// The three products of attention, on tiles that fit into registers. The other files prepare their operands.
//
// Logits and weights of W queries are adjacent: s[key * W + lane]. A "row" is such a vector of queries; several rows share
// the keys of a line, so that each load is used several times.
//
//   dot      s[r][key][lane]   = bias + sum over d of  q[r][lane][d] * k[key][d]    logits, and gradients of weights
//   gather   out[r][lane][d]  += sum over keys of  s[r][key][lane] * v[key][d]      output, gradient of queries
//   scatter  grad[key][d]     += sum over queries of  s[r][key][lane] * q[r][lane][d]   gradients of keys and values
//
// dot keeps sums of rows x keys in registers, over all d. gather and scatter go from lane to lane and keep the rows of v,
// or the sums of grad, of a few keys in registers: from one lane to the next, the window usually moves by one key.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "prefetch.h"
#include "simd.h"

namespace natten {

// Sizes of the tiles: rows of a block; sums of dot, and its largest number of keys; keys of which gather and scatter hold
// two vectors each. They fit into the registers with their operands.
#if defined(__AVX512F__)
constexpr int MAX_ROWS = 4, DOT_SUMS = 24, DOT_KEYS = 7, WINDOW_KEYS = 7;
#elif defined(__aarch64__)
constexpr int MAX_ROWS = 4, DOT_SUMS = 24, DOT_KEYS = 7, WINDOW_KEYS = 7;
#else
constexpr int MAX_ROWS = 3, DOT_SUMS = 12, DOT_KEYS = 7, WINDOW_KEYS = 4;
#endif

// Calls function(integral_constant<int, n>), for n in 1 .. MAX.
template <int MAX, class Function>
NATTEN_INLINE void with_constant(int n, const Function& function) {
  if constexpr (MAX > 1)
    if (n < MAX) return with_constant<MAX - 1>(n, function);
  function(std::integral_constant<int, MAX>{});
}

// Calls function(first, size) for the fewest parts of nearly equal size, of at most `most`.
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

constexpr int dot_keys(int rows) { return DOT_SUMS / rows < DOT_KEYS ? DOT_SUMS / rows : DOT_KEYS; }

// How the keys of the lanes lie in a line of transposed keys, k[d][position].
enum KeyAccess {
  SHIFTED,   // side by side
  PERMUTED,  // within W positions, given by an index vector
  SHARED,    // all lanes have the same key
};

struct DotArguments {
  int dim;              // a multiple of 4
  const float* q;       // [dim][MAX_ROWS][W], of the first row
  const float* k;       // the first key of the first lane
  int64_t k_stride;     // from one d to the next
  IntVec index;         // for PERMUTED
  const float* bias[MAX_ROWS];  // [keys][W] per row
  float* s[MAX_ROWS];           // [keys][W] per row
};

constexpr int DOT_PIECE = 64;  // elements of d that are summed separately, for precision

template <int ROWS, int KEYS, KeyAccess ACCESS>
void dot(const DotArguments& a, int first_key) {
  const int64_t k_stride = a.k_stride;
  const IntVec index = a.index;
  const float *k = a.k + first_key, *q = a.q;
  for (int begin = 0; begin < a.dim; begin += DOT_PIECE) {
    Vec sum[ROWS][KEYS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < KEYS; ++j) sum[r][j] = begin ? Vec{} : load(a.bias[r] + (first_key + j) * W);
    const auto key = [&](int j) __attribute__((always_inline)) {
      if constexpr (ACCESS == SHARED) return held(broadcast(k[j]));
      else if constexpr (ACCESS == SHIFTED) return held(load(k + j));
      else return held(permute(load(k + j), index));
    };
    const auto step = [&]() __attribute__((always_inline)) {  // the smaller side stays in registers
      if constexpr (KEYS < ROWS) {
        Vec x[KEYS];
#pragma GCC unroll 8
        for (int j = 0; j < KEYS; ++j) x[j] = key(j);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const Vec y = held(load(q + r * W));
#pragma GCC unroll 8
          for (int j = 0; j < KEYS; ++j) sum[r][j] += y * x[j];
        }
      } else {
        Vec y[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) y[r] = held(load(q + r * W));
#pragma GCC unroll 8
        for (int j = 0; j < KEYS; ++j) {
          const Vec x = key(j);
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; ++r) sum[r][j] += y[r] * x;
        }
      }
      k += k_stride, q += MAX_ROWS * W;
    };
    const int size = a.dim - begin < DOT_PIECE ? a.dim - begin : DOT_PIECE;
    for (int d = 0; d < size; d += 4) step(), step(), step(), step();
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < KEYS; ++j) {
        float* s = a.s[r] + (first_key + j) * W;
        store(s, begin ? load(s) + sum[r][j] : sum[r][j]);
      }
  }
}

// dot over up to MAX_ROWS rows and any number of keys.
template <KeyAccess ACCESS>
void dot_keys_of(const DotArguments& a, int rows, int keys) {
  with_constant<MAX_ROWS>(rows, [&](auto row_count) {
    constexpr int ROWS = row_count, MOST = dot_keys(ROWS);
    for_each_part(keys, MOST, [&](int first, int size) {
      with_constant<MOST>(size, [&](auto key_count) { dot<ROWS, key_count, ACCESS>(a, first); });
    });
  });
}

inline void dot(const DotArguments& a, KeyAccess access, int rows, int keys) {
  if (access == SHIFTED) dot_keys_of<SHIFTED>(a, rows, keys);
  else if (access == SHARED) dot_keys_of<SHARED>(a, rows, keys);
  else dot_keys_of<PERMUTED>(a, rows, keys);
}

// ---------------------------------------------------------------------------------------------------------------------
// gather and scatter
// ---------------------------------------------------------------------------------------------------------------------

// The lanes whose queries belong to the block, and the first key of each relative to that of lane 0; it never decreases.
struct Lanes {
  int first, end;
  const int* step;
};

// Rows of d of a block, and the weights between them and the keys of a line.
template <class Float>
struct WindowArguments {
  Lanes lanes;
  int rows;
  const float* s;      // [rows][keys][W]
  int64_t s_stride;    // from one row to the next
  Float* x;            // [rows][W][padded]: sums of gather, queries of scatter
  int64_t x_stride;    // from one row to the next
  int64_t padded;      // floats of a row of d, a multiple of W; the same for keys
  Prefetcher* prefetcher;
};

// One lane: the rows of v of its KEYS keys are in v[(P + j) % KEYS].
template <int KEYS, int VECS, int P>
NATTEN_INLINE void gather_lane(const WindowArguments<float>& a, int lane, const Vec (&v)[KEYS][VECS]) {
  const float* s = a.s + lane;
  float* x = a.x + lane * a.padded;
  for (int r = 0; r < a.rows; ++r, s += a.s_stride, x += a.x_stride) {
    Vec sum[VECS];
#pragma GCC unroll 2
    for (int i = 0; i < VECS; ++i) sum[i] = load(x + i * W);
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; ++j) {
      const Vec weight = held(broadcast(s[j * W]));
#pragma GCC unroll 2
      for (int i = 0; i < VECS; ++i) sum[i] += weight * v[(P + j) % KEYS][i];
    }
#pragma GCC unroll 2
    for (int i = 0; i < VECS; ++i) store(x + i * W, sum[i]);
  }
}

template <int KEYS, int VECS, int P>
NATTEN_INLINE void scatter_lane(const WindowArguments<const float>& a, int lane, Vec (&sum)[KEYS][VECS]) {
  const float *s = a.s + lane, *x = a.x + lane * a.padded;
  for (int r = 0; r < a.rows; ++r, s += a.s_stride, x += a.x_stride) {
    Vec query[VECS];
#pragma GCC unroll 2
    for (int i = 0; i < VECS; ++i) query[i] = held(load(x + i * W));
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; ++j) {
      const Vec weight = held(broadcast(s[j * W]));
#pragma GCC unroll 2
      for (int i = 0; i < VECS; ++i) sum[(P + j) % KEYS][i] += weight * query[i];
    }
  }
}

// The KEYS rows of d that the current lane sees. When the window moves by a key, the row that enters takes the place of the
// one that leaves: the rows rotate through the registers, and P, a constant in the code of each position, is the first.
template <int KEYS, int VECS, bool IS_SUM>
struct Window {
  typedef std::conditional_t<IS_SUM, float, const float> Float;
  Vec rows[KEYS][VECS];
  Float* first;    // the row in rows[P]
  int64_t padded;

  NATTEN_INLINE void read(int slot, Float* from) {
#pragma GCC unroll 2
    for (int i = 0; i < VECS; ++i) rows[slot][i] = held(load(from + i * W));
  }
  NATTEN_INLINE void write(int slot, Float* to) const {
    if constexpr (IS_SUM)
#pragma GCC unroll 2
      for (int i = 0; i < VECS; ++i) store(to + i * W, rows[slot][i]);
  }
  NATTEN_INLINE void begin(Float* at) {
    first = at;
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; ++j) read(j, at + j * padded);
  }
  template <int P>
  NATTEN_INLINE void move() {
    write(P, first);
    read(P, first + KEYS * padded);
    first += padded;
  }
  template <int P>
  NATTEN_INLINE void end() const {
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; ++j) write((P + j) % KEYS, first + j * padded);
  }
};

// Lanes from `lane` on that see the keys of position P; then the window moves. Returns whether lanes are left.
template <int P, int KEYS, int VECS, bool IS_SUM, class Arguments>
NATTEN_INLINE bool run_position(const Arguments& a, Window<KEYS, VECS, IS_SUM>& window, int& lane, int& at) {
  for (; lane < a.lanes.end && a.lanes.step[lane] == at; ++lane) {
    if constexpr (IS_SUM) scatter_lane<KEYS, VECS, P>(a, lane, window.rows);
    else gather_lane<KEYS, VECS, P>(a, lane, window.rows);
    a.prefetcher->some();
  }
  if (lane == a.lanes.end) {
    window.template end<P>();
    return false;
  }
  window.template move<P>();
  ++at;
  return true;
}

template <int KEYS, int VECS, bool IS_SUM, class Arguments, class Float, int... P>
void run_window(const Arguments& a, Float* keys, std::integer_sequence<int, P...>) {
  Window<KEYS, VECS, IS_SUM> window;
  window.padded = a.padded;
  int lane = a.lanes.first, at = a.lanes.step[lane];
  window.begin(keys + at * a.padded);
  while ((run_position<P>(a, window, lane, at) && ...)) {
  }
}

// gather if IS_SUM is false, else scatter, over a line of `count` keys; `keys` is the row of d of lane 0's first key.
template <bool IS_SUM, class Arguments, class Float>
void for_windows(Arguments a, int count, Float* keys) {
  const float* s = a.s;
  for (int d = 0; d < a.padded; d += 2 * W, a.x += 2 * W, keys += 2 * W)
    for_each_part(count, WINDOW_KEYS, [&](int first, int size) {
      a.s = s + first * W;
      with_constant<WINDOW_KEYS>(size, [&](auto n) {
        constexpr auto POSITIONS = std::make_integer_sequence<int, n>{};
        if (a.padded - d == W) run_window<n, 1, IS_SUM>(a, keys + first * a.padded, POSITIONS);
        else run_window<n, 2, IS_SUM>(a, keys + first * a.padded, POSITIONS);
      });
    });
}

// gather with the sums of ROWS rows and VECS vectors in registers: faster where 16 registers hold few rows of v.
template <int ROWS, int VECS>
void gather_rows(const WindowArguments<float>& arguments, int count, const float* values) {
  const WindowArguments<float> a = arguments;
  for (int lane = a.lanes.first; lane < a.lanes.end; ++lane) {
    a.prefetcher->some();
    const float *s = a.s + lane, *v = values + a.lanes.step[lane] * a.padded;
    float* x = a.x + lane * a.padded;
    Vec sum[ROWS][VECS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < VECS; ++i) sum[r][i] = load(x + r * a.x_stride + i * W);
    for (int j = 0; j < count; ++j, s += W, v += a.padded) {
      Vec weight[ROWS];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) weight[r] = held(broadcast(s[r * a.s_stride]));
#pragma GCC unroll 4
      for (int i = 0; i < VECS; ++i) {
        const Vec y = held(load(v + i * W));
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) sum[r][i] += weight[r] * y;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < VECS; ++i) store(x + r * a.x_stride + i * W, sum[r][i]);
  }
}

inline void gather(WindowArguments<float> a, int count, const float* values) {
  if constexpr (REGISTERS >= 32) return for_windows<false>(a, count, values);
  for (int d = 0, vectors; d < a.padded; d += vectors * W, a.x += vectors * W, values += vectors * W) {
    vectors = std::min<int>(4, (a.padded - d) / W);
    with_constant<MAX_ROWS>(a.rows, [&](auto rows) {
      with_constant<4>(vectors, [&](auto n) { gather_rows<rows, n>(a, count, values); });
    });
  }
}

inline void scatter(const WindowArguments<const float>& a, int count, float* gradients) {
  for_windows<true>(a, count, gradients);
}

}  // namespace natten
