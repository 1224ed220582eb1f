// Vectors of W floats, of the width of the machine, with the vector extensions of GCC and Clang.
//
// All other files use `Vec`, `W` and the functions below. Intrinsics occur only here and in convert.h, each with a portable
// alternative.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace natten {

#if defined(__AVX512F__)
constexpr int W = 16;          // lanes of a vector
constexpr int REGISTERS = 32;  // vector registers
#elif defined(__AVX__)
constexpr int W = 8;
constexpr int REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int W = 4;
constexpr int REGISTERS = 32;
#else
constexpr int W = 4;
constexpr int REGISTERS = 16;
#endif

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t IntVec __attribute__((vector_size(4 * W)));
typedef float UnalignedVec __attribute__((vector_size(4 * W), aligned(4)));  // GCC and Clang let it alias floats

#define NATTEN_INLINE inline __attribute__((always_inline))

NATTEN_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
NATTEN_INLINE void store(float* p, Vec x) { *reinterpret_cast<UnalignedVec*>(p) = x; }
NATTEN_INLINE Vec broadcast(float x) { return x - Vec{}; }

// Keeps a value in a register. Otherwise GCC loads it again for each use, and loads limit the loop instead of arithmetic.
NATTEN_INLINE Vec held(Vec x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

NATTEN_INLINE Vec select(IntVec mask, Vec yes, Vec no) {
  return reinterpret_cast<Vec>((mask & reinterpret_cast<IntVec>(yes)) | (~mask & reinterpret_cast<IntVec>(no)));
}

// The larger of each pair; b where either is NaN.
NATTEN_INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX__)
  return _mm256_max_ps(a, b);
#else
  return select(a > b, a, b);
#endif
}

// The sum of all lanes.
NATTEN_INLINE float total(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  float sum = 0;
  for (int lane = 0; lane < W; ++lane) sum += x[lane];
  return sum;
#endif
}

// x[index[lane]] in each lane, for indices 0 .. W-1.
NATTEN_INLINE Vec permute(Vec x, IntVec index) {
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), x);
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(x, reinterpret_cast<__m256i>(index));
#elif defined(__aarch64__)
  const IntVec bytes = index * 0x04040404 + 0x03020100;
  return reinterpret_cast<Vec>(vqtbl1q_u8(reinterpret_cast<uint8x16_t>(x), reinterpret_cast<uint8x16_t>(bytes)));
#else
  Vec y;
  for (int lane = 0; lane < W; ++lane) y[lane] = x[index[lane]];
  return y;
#endif
}

constexpr float LN_2 = 0.693147181f;

// 2^x for x <= 127, relative error 1e-7. Exactly 0 below 2^-126. NaN for NaN, if its lowest 9 bits are 0, as in every NaN
// that arithmetic produces.
NATTEN_INLINE Vec exp2(Vec x) {
  const Vec lowest = broadcast(-126.f), magic = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);  // -0.5 .. 0.5
  Vec y = broadcast(1.5345812e-4f);     // minimax for 2^f
  y = y * f + broadcast(1.33999312e-3f);
  y = y * f + broadcast(9.61848896e-3f);
  y = y * f + broadcast(5.55032878e-2f);
  y = y * f + broadcast(2.40226469e-1f);
  y = y * f + broadcast(6.93147206e-1f);
  y = y * f + broadcast(1.f);
  const IntVec bits = reinterpret_cast<IntVec>(y), exponent = reinterpret_cast<IntVec>(shifted) << 23;
#if defined(__AVX512F__)
  const __mmask16 is_seen = _mm512_cmp_ps_mask(x, lowest, _CMP_NLT_UQ);  // also true for NaN
  return reinterpret_cast<Vec>(
      _mm512_maskz_add_epi32(is_seen, reinterpret_cast<__m512i>(bits), reinterpret_cast<__m512i>(exponent)));
#else
  return select(x < lowest, Vec{}, reinterpret_cast<Vec>(bits + exponent));
#endif
}

// Natural logarithm of a normal x > 0, within 3 units in the last place; NaN for NaN.
NATTEN_INLINE Vec log(Vec x) {
  const IntVec bits = reinterpret_cast<IntVec>(x);
  const IntVec offset = bits - 0x3f3504f3;  // so that the mantissa lies in sqrt(1/2) .. sqrt(2)
  const IntVec exponent = offset >> 23;
  const Vec mantissa = reinterpret_cast<Vec>((offset & 0x007fffff) + 0x3f3504f3);
  const Vec z = (mantissa - 1.f) / (mantissa + 1.f);
  const Vec zz = z * z;
  Vec series = broadcast(1.f / 9);
  series = series * zz + broadcast(1.f / 7);
  series = series * zz + broadcast(1.f / 5);
  series = series * zz + broadcast(1.f / 3);
  series = series * zz + broadcast(1.f);
  const Vec result = __builtin_convertvector(exponent, Vec) * broadcast(LN_2) + 2.f * z * series;
  return select(x == x, result, x);
}

// ---------------------------------------------------------------------------------------------------------------------
// Transposition of W x W floats in log2(W) rounds, each of which exchanges blocks with a power of two as size
// ---------------------------------------------------------------------------------------------------------------------

template <int DISTANCE>
NATTEN_INLINE void exchange(Vec& a, Vec& b) {
#if defined(__clang__)
  Vec x, y;
#pragma GCC unroll 16
  for (int lane = 0; lane < W; ++lane) {
    const bool high = lane & DISTANCE;
    x[lane] = high ? b[lane - DISTANCE] : a[lane];
    y[lane] = high ? b[lane] : a[lane + DISTANCE];
  }
#else
  IntVec upper, lower;
#pragma GCC unroll 16
  for (int lane = 0; lane < W; ++lane) {
    const bool high = lane & DISTANCE;
    upper[lane] = high ? W + lane - DISTANCE : lane;
    lower[lane] = high ? W + lane : lane + DISTANCE;
  }
  const Vec x = __builtin_shuffle(a, b, upper), y = __builtin_shuffle(a, b, lower);
#endif
  a = x;
  b = y;
}

template <int DISTANCE>
NATTEN_INLINE void exchange_rows(Vec (&rows)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & DISTANCE)) exchange<DISTANCE>(rows[i], rows[i + DISTANCE]);
  if constexpr (DISTANCE > 1) exchange_rows<DISTANCE / 2>(rows);
}

// to[j][i] = factor * from[i][j] for i, j < W; row strides in floats.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride, float factor = 1.f) {
  Vec rows[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) rows[i] = load(from + i * from_stride);
  exchange_rows<W / 2>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(to + i * to_stride, rows[i] * factor);
}

}  // namespace natten
