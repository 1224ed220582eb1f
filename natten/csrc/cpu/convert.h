// Rows of float32, bfloat16 or float16 in memory, as float32 in scratch.
#pragma once

#include <cstdint>
#include <cstring>

#include "plan.h"
#include "simd.h"

namespace natten {

NATTEN_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

NATTEN_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

struct BFloat16 {
  uint16_t bits;
  operator float() const { return bits_to_float(uint32_t{bits} << 16); }
  static BFloat16 from(float x) {  // to nearest even; NaN stays NaN
    const uint32_t b = float_to_bits(x);
    const uint32_t rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>(x != x ? 0x7fc0 : rounded)};
  }
};

struct Float16 {
  uint16_t bits;
#if defined(__F16C__)
  operator float() const { return _cvtsh_ss(bits); }
  static Float16 from(float x) { return {static_cast<uint16_t>(_cvtss_sh(x, 0))}; }
#elif defined(__aarch64__)
  operator float() const { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits))), 0); }
  static Float16 from(float x) { return {vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0)}; }
#else
  operator float() const {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude << 13));  // infinity, NaN
    // Scaling by 2^112 also makes normal numbers of the subnormal ones.
    return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 5.192296858534828e+33f));
  }
  static Float16 from(float x) {
    const uint32_t sign = (float_to_bits(x) >> 16) & 0x8000;
    uint32_t b = float_to_bits(x) & 0x7fffffff;
    if (b > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (b >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds beyond 65504
    if (b < 0x38800000) {                                               // subnormal: let the addition round
      const float shifted = bits_to_float(b) + 0.5f;
      return {static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000))};
    }
    b += 0xc8000fff + ((b >> 13) & 1);
    return {static_cast<uint16_t>(sign | (b >> 13))};
  }
#endif
};

// --- one vector ------------------------------------------------------------------------------------------------------

NATTEN_INLINE Vec load_vector(const float* x) { return load(x); }
NATTEN_INLINE void store_vector(float* y, Vec x) { store(y, x); }

template <class T>
NATTEN_INLINE Vec load_vector(const T* x) {
  Vec y;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) y[i] = x[i];
  return y;
}

template <class T>
NATTEN_INLINE void store_vector(T* y, Vec x) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) y[i] = T::from(x[i]);
}

typedef uint16_t HalfVec __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef uint32_t UintVec __attribute__((vector_size(4 * W)));

NATTEN_INLINE Vec load_vector(const BFloat16* x) {
  const UintVec wide = __builtin_convertvector(*reinterpret_cast<const HalfVec*>(x), UintVec);
  return reinterpret_cast<Vec>(wide << 16);
}

NATTEN_INLINE void store_vector(BFloat16* y, Vec x) {
  const UintVec bits = reinterpret_cast<UintVec>(x);
  const UintVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UintVec is_number = reinterpret_cast<UintVec>(x == x);
  const UintVec result = (rounded & is_number) | (~is_number & 0x7fc0);
  *reinterpret_cast<HalfVec*>(y) = __builtin_convertvector(result, HalfVec);
}

#if defined(__AVX512F__)
NATTEN_INLINE Vec load_vector(const Float16* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
NATTEN_INLINE void store_vector(Float16* y, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
NATTEN_INLINE Vec load_vector(const Float16* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
NATTEN_INLINE void store_vector(Float16* y, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
NATTEN_INLINE Vec load_vector(const Float16* x) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(x))));
}
NATTEN_INLINE void store_vector(Float16* y, Vec x) {
  vst1_u16(reinterpret_cast<uint16_t*>(y), vreinterpret_u16_f16(vcvt_f16_f32(x)));
}
#endif

// --- part of a vector ------------------------------------------------------------------------------------------------

// The first `count` < W elements, and zeros.
template <class T>
NATTEN_INLINE Vec load_part(const T* x, int count) {
  T part[W] = {};
  std::memcpy(part, x, count * sizeof(T));
  return load_vector(part);
}

template <class T>
NATTEN_INLINE void store_part(T* y, int count, Vec x) {
  T part[W];
  store_vector(part, x);
  std::memcpy(y, part, count * sizeof(T));
}

#if defined(__AVX512F__)
NATTEN_INLINE Vec load_part(const float* x, int count) { return _mm512_maskz_loadu_ps((1 << count) - 1, x); }
NATTEN_INLINE void store_part(float* y, int count, Vec x) { _mm512_mask_storeu_ps(y, (1 << count) - 1, x); }
#elif defined(__AVX2__)
NATTEN_INLINE __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
NATTEN_INLINE Vec load_part(const float* x, int count) { return _mm256_maskload_ps(x, first_lanes(count)); }
NATTEN_INLINE void store_part(float* y, int count, Vec x) { _mm256_maskstore_ps(y, first_lanes(count), x); }
#endif

// --- rows ------------------------------------------------------------------------------------------------------------

// to[i] = scale * from[i] for i < count. Rows of `from` are `step` bytes apart. Rows of `to` have `padded` floats, which is
// dim rounded up to whole vectors; they are 0 beyond dim.
template <class T>
void load_rows(const char* from, int64_t step, int count, int dim, int padded, float scale, float* to) {
  const int whole = dim / W * W;
  for (int i = 0; i < count; ++i, from += step, to += padded) {
    const T* x = reinterpret_cast<const T*>(from);
    for (int d = 0; d < whole; d += W) store(to + d, load_vector(x + d) * scale);
    if (whole < padded) store(to + whole, load_part(x + whole, dim - whole) * scale);
  }
}

// to[i] = scale[i] * from[i], or += if IS_SUM.
template <class T, bool IS_SUM>
void store_rows(const float* from, int padded, int count, int dim, const float* scale, char* to, int64_t step) {
  const int whole = dim / W * W;
  for (int i = 0; i < count; ++i, from += padded, to += step) {
    T* y = reinterpret_cast<T*>(to);
    for (int d = 0; d < whole; d += W) {
      Vec x = load(from + d) * scale[i];
      if constexpr (IS_SUM) x += load_vector(y + d);
      store_vector(y + d, x);
    }
    if (whole < dim) {
      Vec x = load(from + whole) * scale[i];
      if constexpr (IS_SUM) x += load_part(y + whole, dim - whole);
      store_part(y + whole, dim - whole, x);
    }
  }
}

struct RowFunctions {
  void (*load)(const char* from, int64_t step, int count, int dim, int padded, float scale, float* to);
  void (*store)(const float* from, int padded, int count, int dim, const float* scale, char* to, int64_t step);
  void (*add)(const float* from, int padded, int count, int dim, const float* scale, char* to, int64_t step);
  int size;  // bytes of an element
};

template <class T>
constexpr RowFunctions row_functions_of() {
  return {load_rows<T>, store_rows<T, false>, store_rows<T, true>, sizeof(T)};
}

inline RowFunctions row_functions(int64_t dtype) {
  if (dtype == BFLOAT16) return row_functions_of<BFloat16>();
  if (dtype == FLOAT16) return row_functions_of<Float16>();
  return row_functions_of<float>();
}

}  // namespace natten
