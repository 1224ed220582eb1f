// Sums the partial gradients of rpb from the blocks of a backward kernel, in a fixed order. The result is deterministic.
// One kernel per kernel_size: the sums depend on nothing else.
#define HEAD_DIM 8
#define ELEMENT 0
#define HAS_RPB 1
#define HAS_LONG_STEPS 0
#define STRIDE_Z 1
#define STRIDE_Y 1
#define STRIDE_X 1
#define CAUSAL_Z 0
#define CAUSAL_Y 0
#define CAUSAL_X 0
#include "problem.h"

namespace natten {
constexpr int SUM_THREADS = 1024;
}

NATTEN_KERNEL(natten_sum_parts, natten::SUM_THREADS) {
  using namespace natten;
  __shared__ float sums[SUM_THREADS];
  // A block sums 32 entries. Each warp reads all of them, so that reads are coalesced; the warps share the parts.
  const int head = blockIdx.x % p.heads, entry = blockIdx.x / p.heads * 32 + threadIdx.x % 32;
  const float* from = p.partial_rpb + head * static_cast<long long>(p.parts) * TABLE;
  float sum = 0;
  if (entry < TABLE)
#pragma unroll 8  // independent loads
    for (int part = threadIdx.x / 32; part < p.parts; part += SUM_THREADS / 32)
      sum += from[part * static_cast<long long>(TABLE) + entry];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || entry >= TABLE) return;
  for (int i = 32; i < SUM_THREADS; i += 32) sum += sums[threadIdx.x + i];
  p.grad_rpb[head * static_cast<long long>(TABLE) + entry] = sum;
}
