// Small kernels that test the emulation. MISTAKE selects a mistake that it must detect.
namespace natten {
struct Params {
  float* in;
  float* out;
};
}  // namespace natten
#define ELEMENT 2
#include "instructions.h"

// Sums 64 numbers: within a warp by shuffles, across warps in shared memory.
NATTEN_KERNEL(probe_sum, 64) {
  __shared__ float sums[2];
  float sum = p.in[threadIdx.x];
  for (int mask = 16; mask; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
#if MISTAKE != 1
  __syncthreads();
#endif
  if (threadIdx.x == 63) p.out[blockIdx.x] = sums[0] + sums[1];
  __syncthreads();
  if (threadIdx.x == 63) sums[0] = sums[1] = __uint_as_float(0x7fc00000);  // for the next block
}

// With MISTAKE 2, some threads never reach the barrier. With 9 and 10, a vector and a number are not aligned.
NATTEN_KERNEL(probe_barrier, 64) {
  if (MISTAKE == 9) *reinterpret_cast<float2*>(p.out + 1) = {1.f, 2.f};
  if (MISTAKE == 10) *reinterpret_cast<float*>(reinterpret_cast<char*>(p.out) + 2) = 1.f;
  if (MISTAKE != 2 || threadIdx.x < 40) __syncthreads();
  atomicAdd(p.out, 1.f);
}

// Copies 16 x 16 halves to shared memory and multiplies them by themselves, or by their transpose. With MISTAKE 11, a copy of 16
// bytes takes 18.
NATTEN_KERNEL(probe_matrix, 32) {
  NATTEN_SHARED_MEMORY(shared);
  const int lane = threadIdx.x;
  if (MISTAKE == 11) natten::copy_async_part(shared + lane * 16, p.in + lane * 4, 18);
  natten::copy_async(shared + lane * 16, p.in + lane * 4, true);
  natten::commit_copies();
#if MISTAKE != 3
  natten::wait_copies<0>();
#endif
  __syncwarp();
  unsigned a[4], b[4];
  const char* row = shared + (lane % 16) * 32 + lane / 16 * 16;
  natten::load_matrices<4, false>(a, row);                // rows 0-7 and 8-15 of the left half, then of the right
  natten::load_matrices<4, true>(b, row);
  float plain[2][4] = {}, transposed[2][4] = {}, half_depth[4] = {};
  natten::multiply_add<natten::Half, 16>(plain[0], a, b);
  natten::multiply_add<natten::Half, 16>(plain[1], a, b + 2);
  const unsigned left[2] = {a[0], a[2]}, right[2] = {a[1], a[3]};
  natten::multiply_add<natten::Half, 16>(transposed[0], a, left);
  natten::multiply_add<natten::Half, 16>(transposed[1], a, right);
  natten::multiply_add<natten::Half, 8>(half_depth, a, left);
  for (int i = 0; i < 4; ++i) {
    const int at = (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2;
    for (int block = 0; block < 2; ++block) {
      p.out[block * 128 + at] = plain[block][i];
      p.out[256 + block * 128 + at] = transposed[block][i];
    }
    p.out[512 + at] = half_depth[i];
  }
  if (MISTAKE == 4) shared[512 + lane] = 0;
}

// Multiplies 16 x 8 numbers by the first 8 of them, transposed, in TF32.
NATTEN_KERNEL(probe_tfloat, 32) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4;
  unsigned a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    const float value = p.in[(row + i % 2 * 8) * 8 + column + i / 2 * 4];
    a[i] = MISTAKE == 5 ? __float_as_uint(value) : natten::round_to_tfloat(value);
    if (i % 2 == 0) b[i / 2] = a[i];
  }
  float product[4] = {};
  natten::multiply_add<natten::Tfloat, 8>(product, a, b);
  for (int i = 0; i < 4; ++i) p.out[(row + i / 2 * 8) * 8 + column * 2 + i % 2] = product[i];
}

// Sums the first number of 4 of all threads over 3 stages, each of which is copied to the same memory.
NATTEN_KERNEL(probe_stages, 64) {
  NATTEN_SHARED_MEMORY(shared);
  const int thread = threadIdx.x;
  float sum = 0;
  for (int stage = 0; stage < 3; ++stage) {
    natten::copy_async(shared + thread * 16, p.in + (stage * 64 + thread) * 4, true);
    natten::commit_copies();
    natten::wait_copies<0>();
    __syncthreads();
    sum += reinterpret_cast<const float*>(shared)[(63 - thread) * 4];
#if MISTAKE != 6
    __syncthreads();
#endif
  }
  p.out[thread] = sum;
}

// Reads shared memory with and without bank conflicts.
NATTEN_KERNEL(probe_banks, 32) {
  NATTEN_SHARED_MEMORY(shared);
  float* numbers = reinterpret_cast<float*>(shared);
  const int lane = threadIdx.x;
  if (MISTAKE != 8)
    for (int i = lane; i < 1024; i += 32) numbers[i] = i;
#if MISTAKE != 7
  __syncwarp();
#else
  __shfl_xor_sync(~0u, lane, 1);  // orders no accesses to memory
#endif
  const float same = numbers[0];  // a line for each load, because accesses are counted by line
  const float two = numbers[lane * 2];
  const float all = numbers[lane * 32];
  const float none = numbers[lane * 31];
  const float2 pair = reinterpret_cast<const float2*>(numbers)[lane];
  const float4 four = reinterpret_cast<const float4*>(numbers)[lane];
  const float4 other = reinterpret_cast<const float4*>(numbers)[lane * 2];
  p.out[lane] = same + two + all + none + pair.y + four.z + other.w;
}
