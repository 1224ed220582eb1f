// Element types, and PTX instructions without a C++ equivalent. If NATTEN_EMULATION is defined, tests/emulation implements
// these and the CUDA keywords on a CPU. For the layout of fragments, see "Matrix Fragments for mma.m16n8k16" in the PTX
// manual.
#pragma once

#ifdef NATTEN_EMULATION
#include "emulation.h"
#else

#define NATTEN_SHARED_MEMORY(name) extern __shared__ __align__(128) char name[]
// Arguments after the name: threads per block and, optionally, the minimum of resident blocks per multiprocessor.
#define NATTEN_KERNEL(name, ...) \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name(const __grid_constant__ natten::Params p)

using uint16_t = unsigned short;

namespace natten {

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ __forceinline__ uint16_t float_to_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
__device__ __forceinline__ uint16_t float_to_bfloat(float value) {
#if __CUDA_ARCH__ >= 800
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#else
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#endif
}

// Tells the compiler that a pointer is to global memory, where it cannot derive that from a parameter.
template <class T>
__device__ __forceinline__ T* to_global(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#if __CUDA_ARCH__ >= 800

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Copies 16, 8 or 4 bytes, or zeros, to shared memory. This thread sees them after wait_copies, others also need a barrier.
template <int BYTES = 16>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool is_there) {
  const int bytes = is_there ? BYTES : 0;
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES), "r"(bytes)
                 : "memory");
}
// Copies the first `bytes` of 16, and zeros after them, to shared memory. Does nothing if `bytes` is 0 or negative.
__device__ __forceinline__ void copy_async_part(void* to, const void* from, int bytes) {
  asm volatile(
      "{\n.reg .pred any;\nsetp.gt.s32 any, %2, 0;\n@any cp.async.cg.shared.global [%0], [%1], 16, %2;\n}" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes)
      : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Loads COUNT matrices of 8 x 8 halves. Lane 8 m + r provides the address of row r of matrix m.
template <int COUNT, bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(unsigned* out, const void* row) {
  const unsigned at = shared_address(row);
  if constexpr (COUNT == 4 && !TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(at) : "memory");
  else if constexpr (COUNT == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(at) : "memory");
  else if constexpr (COUNT == 2 && !TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1]) : "r"(at) : "memory");
  else if constexpr (COUNT == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1]) : "r"(at) : "memory");
  else if constexpr (!TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(out[0]) : "r"(at) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(out[0]) : "r"(at) : "memory");
}

// Loads two numbers from shared memory, again for each call: to load them is cheaper than to move them to the adjacent
// registers that matrix instructions require.
__device__ __forceinline__ float2 load_pair(const void* from) {
  float2 two;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(two.x), "=f"(two.y) : "r"(shared_address(from)) : "memory");
  return two;
}

// Returns a word whose origin the first compiler does not know, so that what depends on it is computed after this point. If
// `zero` is 0 at run time, but not at compile time, the second compiler (ptxas) does not know it, either.
__device__ __forceinline__ unsigned renew(unsigned word, unsigned zero) {
  asm volatile("xor.b32 %0, %0, %1;" : "+r"(word) : "r"(zero));
  return word;
}

// Rounds a number to TF32, with 10 bits of fraction, as the matrix instructions for float32 require.
__device__ __forceinline__ unsigned round_to_tfloat(float value) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// c[16][8] += a[16][DEPTH] b[DEPTH][8]. DEPTH is 16 or 8, for Tfloat 8. A and C are row-major, B is column-major.
template <class Element, int DEPTH>
__device__ __forceinline__ void multiply_add(float* c, const unsigned* a, const unsigned* b) {
  if constexpr (Element::IS_TFLOAT)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else if constexpr (Element::IS_BFLOAT && DEPTH == 16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else if constexpr (Element::IS_BFLOAT)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  else if constexpr (DEPTH == 16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

#endif  // __CUDA_ARCH__ >= 800

}  // namespace natten

#endif  // NATTEN_EMULATION

namespace natten {

// Bytes after each region of shared memory. Only the emulation has them; it detects accesses to them.
#ifdef NATTEN_EMULATION
constexpr int GUARD = 128;
#else
constexpr int GUARD = 0;
#endif

struct Float {
  using Storage = float;
  static constexpr bool IS_BFLOAT = false, IS_TFLOAT = false;
  static __device__ __forceinline__ float widen(float value) { return value; }
  static __device__ __forceinline__ float narrow(float value) { return value; }
};

// Float32 that matrix products round to TF32.
struct Tfloat : Float {
  static constexpr bool IS_TFLOAT = true;
};

struct Bfloat {
  using Storage = uint16_t;
  static constexpr bool IS_BFLOAT = true, IS_TFLOAT = false;
  static __device__ __forceinline__ float widen(uint16_t bits) {
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
  }
  static __device__ __forceinline__ uint16_t narrow(float value) { return float_to_bfloat(value); }
};

struct Half {
  using Storage = uint16_t;
  static constexpr bool IS_BFLOAT = false, IS_TFLOAT = false;
  static __device__ __forceinline__ float widen(uint16_t bits) { return half_to_float(bits); }
  static __device__ __forceinline__ uint16_t narrow(float value) { return float_to_half(value); }
};

#if ELEMENT == 0
using Element = Float;
#elif ELEMENT == 1
using Element = Bfloat;
#elif ELEMENT == 2
using Element = Half;
#elif ELEMENT == 3
using Element = Tfloat;
#else
#error "ELEMENT must be 0 to 3"
#endif
using Storage = Element::Storage;

// Rounds two numbers to 16 bits and packs them into a word, the first in the low bits.
__device__ __forceinline__ unsigned pack(float low, float high) {
#if !defined(NATTEN_EMULATION) && __CUDA_ARCH__ >= 800 && ELEMENT == 1
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#elif !defined(NATTEN_EMULATION) && __CUDA_ARCH__ >= 800 && ELEMENT == 2
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return static_cast<unsigned>(Element::narrow(low)) | static_cast<unsigned>(Element::narrow(high)) << 16;
#endif
}
__device__ __forceinline__ float low_of(unsigned word) { return Element::widen(static_cast<uint16_t>(word)); }
__device__ __forceinline__ float high_of(unsigned word) { return Element::widen(static_cast<uint16_t>(word >> 16)); }

// The product of two words, each with one number of 32 bits or two of 16 bits.
__device__ __forceinline__ float dot(unsigned one, unsigned two) {
  if (sizeof(Storage) == 4) return __uint_as_float(one) * __uint_as_float(two);
  return low_of(one) * low_of(two) + high_of(one) * high_of(two);
}

}  // namespace natten
