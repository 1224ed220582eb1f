// Fused attention, forward, without matrix instructions: NAT, section 3 (arXiv:2204.07143), with an online softmax over the
// keys of a window.
#include "groups.h"

namespace natten {

__device__ inline void attend(const Params& p, const Token& token) {
  const Rows<const Storage> query(p, QUERY, token.map), key(p, KEY, token.map), value(p, VALUE, token.map);
  const float scale = p.scale * LOG2_E;
  QueryItems q, k;
  ValueItems v, sum;
  q.load(query.at(token.z, token.y, token.x));
  sum.clear();
  float largest = -__uint_as_float(0x7f800000), total = 0;
  for (int kz = token.keys_z.first; kz < token.keys_z.end; ++kz)
    for (int ky = token.keys_y.first; ky < token.keys_y.end; ++ky) {
      const float* bias = bias_row(p, token.map.head, kz, ky, token.z, token.y) + (KERNEL_X - 1 - token.x);
      for (int slot = 0; slot < KERNEL_X; ++slot) {
        const int kx = token.start_x + slot;
        const bool is_seen = token.keys_x.holds(kx);
        const int x = is_seen ? kx : token.keys_x.first;
        k.load(key.at(kz, ky, x));
        float logit = dot(q, k) * scale;
        if (!is_seen) continue;
        if (HAS_RPB) logit += bias[x] * LOG2_E;
        v.load(value.at(kz, ky, x));
        const float top = max(largest, logit), factor = exp2f(largest - top), weight = exp2f(logit - top);
        largest = top;
        total = total * factor + weight;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) sum.x[i] = sum.x[i] * factor + weight * v.x[i];
      }
    }
  if (!token.is_there) return;
  sum.store(Rows<Storage>(p, OUT, token.map).at(token.z, token.y, token.x), 1 / total);
  if (lane_of_group() == 0)
    *Rows<float>(p, LSE, token.map).at(token.z, token.y, token.x) = (largest + log2f(total)) * LN_2;
}

}  // namespace natten

NATTEN_KERNEL(natten_attention, natten::THREADS) {
  natten::Token token;
  if (token.locate(p, blockIdx.x / p.heads, blockIdx.x % p.heads)) natten::attend(p, token);
}
