// The structures that natten/backends/cpu passes: a plan per problem, and the addresses of its tensors.
#pragma once

#include <cstdint>

namespace natten {

enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

inline int element_size(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

struct Axis {
  int64_t length, kernel_size, stride, dilation, is_causal;
};

// Strides in elements of a tensor [batch, axis 0, axis 1, axis 2, heads, items], whose items are contiguous.
struct Strides {
  int64_t batch, axis[3], head;
};

// The tensors of a problem. No operator has all of them. The order is that of TENSORS in natten/backends/kernels.py.
enum TensorName {
  QUERY, KEY, VALUE, OUT, LSE, ATTN, GRAD_OUT, GRAD_LSE, GRAD_ATTN, GRAD_QUERY, GRAD_KEY, GRAD_VALUE, TENSORS
};

struct Plan {
  int64_t dtype;  // of all tensors except lse, grad_lse and the bias, which are float32
  int64_t batch, heads, kv_heads;  // each head of keys and values serves heads / kv_heads heads of queries
  int64_t dim, value_dim;          // head_dim of queries and keys; of values
  Axis axis[3];  // problems with fewer axes have leading axes of one token and a window of one
  double scale;
  Strides strides[TENSORS];
};

struct Call {
  const Plan* plan;
  void* const* tensors;   // by TensorName
  const float* rpb;       // [heads, 2K - 1 of each axis], contiguous; or null
  float* grad_rpb;        // the same shape; or null
  int threads;
};

}  // namespace natten
