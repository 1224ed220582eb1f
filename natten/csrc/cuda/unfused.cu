// Unfused attention (query_key and weight_value) and its gradients. Three loops over windows implement all kernels. All
// rows have HEAD_DIM elements. One kernel serves problems with and without a bias, so HAS_RPB is 1.
#include "groups.h"

namespace natten {

// to[query][slot] = left[query] * right[key], summed over head_dim, plus the bias; `outside` in slots before the map.
__device__ inline void dot_windows(const Params& p, TensorName left, TensorName right, TensorName to, float outside,
                                   const Token& token) {
  const Submap& map = token.map;
  const Rows<const Storage> rights(p, right, map);
  Storage* slots = Rows<Storage>(p, to, map).at(token.z, token.y, token.x);
  QueryItems q, k;
  q.load(Rows<const Storage>(p, left, map).at(token.z, token.y, token.x));
  for (int i = 0; i < WINDOW; ++i) {
    const int kz = token.start_z + i / (KERNEL_Y * KERNEL_X), ky = token.start_y + i / KERNEL_X % KERNEL_Y;
    const int kx = token.start_x + i % KERNEL_X;
    const bool is_seen = token.keys_z.holds(kz) && token.keys_y.holds(ky) && token.keys_x.holds(kx);
    if (is_seen) k.load(rights.at(kz, ky, kx));
    else k.clear();
    float value = dot(q, k);
    if (p.rpb && is_seen) value += bias_row(p, map.head, kz, ky, token.z, token.y)[kx - token.x + KERNEL_X - 1];
    if (token.is_there && lane_of_group() == 0) slots[i] = Element::narrow(is_seen ? value : outside);
  }
}

// to[query] = sum over keys of weights[query][slot] * rows[key].
__device__ inline void sum_windows(const Params& p, TensorName weights, TensorName rows, TensorName to,
                                   const Token& token) {
  const Submap& map = token.map;
  const Rows<const Storage> values(p, rows, map);
  const Storage* slots = Rows<const Storage>(p, weights, map).at(token.z, token.y, token.x);
  QueryItems v, sum;
  sum.clear();
  for (int kz = token.keys_z.first; kz < token.keys_z.end; ++kz)
    for (int ky = token.keys_y.first; ky < token.keys_y.end; ++ky)
      for (int kx = token.keys_x.first; kx < token.keys_x.end; ++kx) {
        v.load(values.at(kz, ky, kx));
        const int slot = slot_index(kz - token.start_z, ky - token.start_y, kx - token.start_x);
        sum.add(v, Element::widen(slots[slot]));
      }
  if (token.is_there) sum.store(Rows<Storage>(p, to, map).at(token.z, token.y, token.x), 1.f);
}

// to[key] = sum over queries whose window contains the key of weights[query][slot] * rows[query].
__device__ inline void sum_inverse(const Params& p, TensorName weights, TensorName rows, TensorName to,
                                   const Token& token) {
  const Submap& map = token.map;
  const Rows<const Storage> values(p, rows, map), slots(p, weights, map);
  const Span zs = WindowsZ::queries(token.z, map.n[0]), ys = WindowsY::queries(token.y, map.n[1]);
  const Span xs = WindowsX::queries(token.x, map.n[2]);
  QueryItems v, sum;
  sum.clear();
  for (int z = zs.first; z < zs.end; ++z)
    for (int y = ys.first; y < ys.end; ++y)
      for (int x = xs.first; x < xs.end; ++x) {
        v.load(values.at(z, y, x));
        const int slot = slot_index(token.z - WindowsZ::start(z, map.n[0]), token.y - WindowsY::start(y, map.n[1]),
                                    token.x - WindowsX::start(x, map.n[2]));
        sum.add(v, Element::widen(slots.at(z, y, x)[slot]));
      }
  if (token.is_there) sum.store(Rows<Storage>(p, to, map).at(token.z, token.y, token.x), 1.f);
}

// Sums the gradients of logits [query][slot] per entry of the bias table.
__device__ inline void sum_bias(const Params& p, const Token& token, TableGradient& table) {
  const Submap& map = token.map;
  const Rows<const Storage> slots(p, GRAD_ATTN, map);
  for (int kz = token.keys_z.first; kz < token.keys_z.end; ++kz)
    for (int ky = token.keys_y.first; ky < token.keys_y.end; ++ky)
      table.add_row(kz - token.z + KERNEL_Z - 1, ky - token.y + KERNEL_Y - 1, [&](int group, int entry) {
        const int s = token.first_x + group, n = map.n[2], kx = entry - (KERNEL_X - 1) + s;
        if (s >= n || !WindowsX::keys(s, n).holds(kx)) return 0.f;
        const int slot = slot_index(kz - token.start_z, ky - token.start_y, kx - WindowsX::start(s, n));
        return Element::widen(slots.at(token.z, token.y, s)[slot]);
      });
}

}  // namespace natten

#define UNFUSED_KERNEL(name, ...)                                                                \
  NATTEN_KERNEL(name, natten::THREADS) {                                                         \
    using namespace natten;                                                                      \
    Token token;                                                                                 \
    if (token.locate(p, blockIdx.x / p.heads, blockIdx.x % p.heads)) __VA_ARGS__;                \
  }

UNFUSED_KERNEL(natten_query_key, dot_windows(p, QUERY, KEY, ATTN, -__uint_as_float(0x7f800000), token))
UNFUSED_KERNEL(natten_query_key_grad_query, sum_windows(p, GRAD_ATTN, KEY, GRAD_QUERY, token))
UNFUSED_KERNEL(natten_query_key_grad_key, sum_inverse(p, GRAD_ATTN, QUERY, GRAD_KEY, token))
UNFUSED_KERNEL(natten_weight_value, sum_windows(p, ATTN, VALUE, OUT, token))
UNFUSED_KERNEL(natten_weight_value_grad_weight, dot_windows(p, GRAD_OUT, VALUE, GRAD_ATTN, 0.f, token))
UNFUSED_KERNEL(natten_weight_value_grad_value, sum_inverse(p, ATTN, GRAD_OUT, GRAD_VALUE, token))

NATTEN_KERNEL(natten_query_key_grad_rpb, natten::THREADS) {
  using namespace natten;
  __shared__ float sums[TableGradient::SHARED];
  const int head = blockIdx.x % p.heads, part = blockIdx.x / p.heads;
  int first, end;
  share_of(p, part, first, end);
  Token token;
  TableGradient table(p, head, part, sums);
  for (int piece = first; piece < end; ++piece)
    if (token.locate(p, piece, head)) sum_bias(p, token, table);
  table.finish();
}
