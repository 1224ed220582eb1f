// Runs CUDA C++ on a CPU, to test arithmetic, synchronization and the use of shared memory without a GPU.
//
// Each thread of a block is a fiber. The next fiber to run is chosen at random, so code that depends on an order fails.
// A fiber runs until a barrier, a shuffle or a matrix instruction, where all threads of its block or warp must meet. If
// they cannot meet, the run ends with an error. Blocks run one after another in random order.
//
// Each access to shared memory is checked (memory.cpp). The run ends with an error if two accesses race, if one touches an
// asynchronous copy that is not complete, reads what nothing has written, or goes beyond its region. The wavefronts that
// the accesses take can be counted (wavefronts.py).
//
// Not covered: wgmma, TMA, races in global memory, and whether the fragment layouts, which follow the PTX manual, match
// the hardware.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.h"

// ---------------------------------------------------------------------------------------------------------------------
// CUDA C++ keywords and functions
// ---------------------------------------------------------------------------------------------------------------------

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#if defined(__ELF__)
#define __shared__ static __attribute__((section("natten_shared")))
#else
#define __shared__ static
#endif
#define threadIdx (emulation::thread_index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)
#define EMULATION_INLINE inline __attribute__((always_inline))
// Identifies a statement. Threads must meet at the same one.
#define EMULATION_SITE              \
  [] {                              \
    static const char site = 0;     \
    return static_cast<const void*>(&site); \
  }()

// Vectors, which one instruction moves as a whole.
template <class T>
struct alignas(2 * sizeof(T)) EmulationPair {
  T x, y;
  EMULATION_INLINE EmulationPair() {}
  EMULATION_INLINE EmulationPair(T x, T y) : x(x), y(y) {}
  EMULATION_INLINE EmulationPair(const EmulationPair& from) { emulation::move_vector(this, &from, sizeof from); }
  EMULATION_INLINE EmulationPair& operator=(const EmulationPair& from) {
    emulation::move_vector(this, &from, sizeof from);
    return *this;
  }
};
template <class T>
struct alignas(4 * sizeof(T)) EmulationQuad {
  T x, y, z, w;
  EMULATION_INLINE EmulationQuad() {}
  EMULATION_INLINE EmulationQuad(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  EMULATION_INLINE EmulationQuad(const EmulationQuad& from) { emulation::move_vector(this, &from, sizeof from); }
  EMULATION_INLINE EmulationQuad& operator=(const EmulationQuad& from) {
    emulation::move_vector(this, &from, sizeof from);
    return *this;
  }
};
using float2 = EmulationPair<float>;
using float4 = EmulationQuad<float>;
using uint2 = EmulationPair<unsigned>;
using uint4 = EmulationQuad<unsigned>;

#define __syncthreads() emulation::meet_block(EMULATION_SITE)
#define __syncwarp() emulation::order_warp(EMULATION_SITE)

template <int MASK, class T>
void emulation_exchange(emulation::Lane* const* lanes) {
  for (int i = 0; i < 32; ++i)
    *static_cast<T*>(lanes[i]->result) = *static_cast<const T*>(lanes[i ^ MASK]->argument);
}
template <class T>
T emulation_shuffle_xor(const void* site, T value, int mask) {
  T result;
  emulation::Act act = nullptr;
  switch (mask) {
    case 1: act = emulation_exchange<1, T>; break;
    case 2: act = emulation_exchange<2, T>; break;
    case 4: act = emulation_exchange<4, T>; break;
    case 8: act = emulation_exchange<8, T>; break;
    case 16: act = emulation_exchange<16, T>; break;
    default: emulation::fail("the emulation exchanges lanes by powers of two");
  }
  emulation::meet_warp(site, &value, &result, act);
  return result;
}
inline bool emulation_any(const void* site, bool value) {
  bool result;
  emulation::meet_warp(site, &value, &result, [](emulation::Lane* const* lanes) {
    bool any = false;
    for (int i = 0; i < 32; ++i) any |= *static_cast<const bool*>(lanes[i]->argument);
    for (int i = 0; i < 32; ++i) *static_cast<bool*>(lanes[i]->result) = any;
  });
  return result;
}
#define __any_sync(all, value) emulation_any(EMULATION_SITE, value)
#define __shfl_xor_sync(all, value, mask) emulation_shuffle_xor(EMULATION_SITE, value, mask)

EMULATION_INLINE float atomicAdd(float* at, float value) { return emulation::atomic_add(at, value); }

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
// Selectors have four numbers below 8.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned which = selector >> 4 * i & 7;
    result |= ((which < 4 ? x : y) >> which % 4 * 8 & 0xff) << 8 * i;
  }
  return result;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float max(float a, float b) { return a > b ? a : b; }

// ---------------------------------------------------------------------------------------------------------------------
// The instructions of natten/csrc/cuda/instructions.h
// ---------------------------------------------------------------------------------------------------------------------

namespace natten {

inline float half_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return value;
}
inline uint16_t float_to_half(float value) {
  const _Float16 rounded = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}
inline uint16_t float_to_bfloat(float value) {
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned round_to_tfloat(float value) {
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fffe000;
  return (bits + 0x1000) & ~0x1fffu;
}

template <class T>
T* to_global(T* pointer) {
  return pointer;
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal_fast(float x) { return 1 / x; }

template <int BYTES = 16>
EMULATION_INLINE void copy_async(void* to, const void* from, bool is_there) {
  emulation::copy_async(to, is_there ? from : nullptr, BYTES, BYTES);
}
EMULATION_INLINE void copy_async_part(void* to, const void* from, int bytes) {
  if (bytes > 0) emulation::copy_async(to, from, 16, bytes);
}
EMULATION_INLINE void commit_copies() { emulation::commit_copies(); }
template <int PENDING>
EMULATION_INLINE void wait_copies() {
  emulation::wait_copies(PENDING);
}
template <int COUNT, bool TRANSPOSED>
EMULATION_INLINE void load_matrices(unsigned* out, const void* row) {
  emulation::load_matrices(EMULATION_SITE, out, row, COUNT, TRANSPOSED);
}
EMULATION_INLINE unsigned renew(unsigned word, unsigned zero) { return word ^ zero; }
EMULATION_INLINE float2 load_pair(const void* from) { return *static_cast<const float2*>(from); }
template <class Element, int DEPTH>
EMULATION_INLINE void multiply_add(float* c, const unsigned* a, const unsigned* b) {
  constexpr emulation::Format FORMAT = Element::IS_TFLOAT   ? emulation::TFLOAT
                                       : Element::IS_BFLOAT ? emulation::BFLOAT
                                                            : emulation::HALF;
  emulation::multiply_add(EMULATION_SITE, c, a, b, FORMAT, DEPTH);
}

}  // namespace natten

#define NATTEN_SHARED_MEMORY(name) char* const name = emulation::shared_memory()
// Defines the kernel `name` and a function that runs it, for Python: emulate_NAME(parameters, grid, threads, shared, seed).
#define NATTEN_KERNEL(name, ...)                                                                                      \
  static void name(const natten::Params p);                                                                           \
  extern "C" __attribute__((visibility("default"))) const char* emulate_##name(                                       \
      const void* parameters, const unsigned* grid, unsigned count, size_t shared, uint64_t seed) {                   \
    return emulation::run([](const void* given) { name(*static_cast<const natten::Params*>(given)); }, parameters,    \
                          {grid[0], grid[1], grid[2]}, count, shared, seed);                                          \
  }                                                                                                                   \
  static void name(const natten::Params p)
