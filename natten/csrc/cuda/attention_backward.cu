// Fused attention, backward, without matrix instructions. As in FlashAttention (arXiv:2205.14135), the weights are
// recomputed from the logsumexp. The first kernel computes the gradients of queries and rpb, and `delta`; the second those
// of keys and values. Each group computes the gradient of one token.
#include "groups.h"

namespace natten {

constexpr int SLOTS = KERNEL_X < 32 ? KERNEL_X : 32;  // slots in a row of a window that are processed at a time

// `grad_logits`: [GROUPS][SLOTS] in shared memory; `table`: null if rpb has no gradient.
__device__ inline void differentiate_query(const Params& p, const Token& token, float* grad_logits, TableGradient* table) {
  const Submap& map = token.map;
  const Rows<const Storage> key(p, KEY, map), value(p, VALUE, map);
  QueryItems q, k, grad_q;
  ValueItems v, out, grad_out;
  q.load(Rows<const Storage>(p, QUERY, map).at(token.z, token.y, token.x));
  out.load(Rows<const Storage>(p, OUT, map).at(token.z, token.y, token.x));
  grad_out.load(Rows<const Storage>(p, GRAD_OUT, map).at(token.z, token.y, token.x));
  grad_q.clear();
  const float lse = *Rows<const float>(p, LSE, map).at(token.z, token.y, token.x);
  float delta = dot(out, grad_out);
  if (p.tensors[GRAD_LSE].data) delta -= *Rows<const float>(p, GRAD_LSE, map).at(token.z, token.y, token.x);
  if (token.is_there && lane_of_group() == 0) *Rows<float>(p, DELTA, map).at(token.z, token.y, token.x) = delta;

  for (int kz = token.keys_z.first; kz < token.keys_z.end; ++kz)
    for (int ky = token.keys_y.first; ky < token.keys_y.end; ++ky) {
      const float* bias = bias_row(p, map.head, kz, ky, token.z, token.y) + (KERNEL_X - 1 - token.x);
      for (int first = 0; first < KERNEL_X; first += SLOTS) {
        for (int i = 0; i < SLOTS && first + i < KERNEL_X; ++i) {
          const int kx = token.start_x + first + i;
          const bool is_seen = token.keys_x.holds(kx) && token.is_there;
          const int x = is_seen ? kx : token.keys_x.first;
          k.load(key.at(kz, ky, x)), v.load(value.at(kz, ky, x));
          const float logit = dot(q, k) * p.scale + (HAS_RPB ? bias[x] : 0.f);
          const float grad_weight = dot(grad_out, v);
          const float weight = is_seen ? exp2f((logit - lse) * LOG2_E) : 0.f, grad_logit = weight * (grad_weight - delta);
          grad_q.add(k, grad_logit);
          if (table && lane_of_group() == 0) grad_logits[group_of_thread() * SLOTS + i] = grad_logit;
        }
        if (!table) continue;
        __syncthreads();
        const int n = map.n[2];
        table->add_row(kz - token.z + KERNEL_Z - 1, ky - token.y + KERNEL_Y - 1, [&](int group, int entry) {
          const int s = token.first_x + group;
          if (s >= n) return 0.f;
          const int i = entry - (KERNEL_X - 1) + s - WindowsX::start(s, n) - first;
          return i >= 0 && i < SLOTS && first + i < KERNEL_X ? grad_logits[group * SLOTS + i] : 0.f;
        });
        __syncthreads();
      }
    }
  if (token.is_there) grad_q.store(Rows<Storage>(p, GRAD_QUERY, map).at(token.z, token.y, token.x), p.scale);
}

// Adds the contribution of the queries of head map.head.
__device__ inline void add_queries(const Params& p, const Token& token, const Submap& map, const QueryItems& k,
                                   const ValueItems& v, QueryItems& grad_k, ValueItems& grad_v) {
  const Rows<const Storage> query(p, QUERY, map), grad_out(p, GRAD_OUT, map);
  const Rows<const float> lse(p, LSE, map), delta(p, DELTA, map);
  QueryItems q;
  ValueItems g;
  const Span zs = WindowsZ::queries(token.z, map.n[0]), ys = WindowsY::queries(token.y, map.n[1]);
  const Span xs = WindowsX::queries(token.x, map.n[2]);
  const int count = largest_in_warp(xs.end - xs.first);
  for (int z = zs.first; z < zs.end; ++z)
    for (int y = ys.first; y < ys.end; ++y) {
      const float* bias = bias_row(p, map.head, token.z, token.y, z, y) + (token.x + KERNEL_X - 1);
      for (int i = 0; i < count; ++i) {
        const bool sees = xs.first + i < xs.end;
        const int x = sees ? xs.first + i : xs.first;
        q.load(query.at(z, y, x)), g.load(grad_out.at(z, y, x));
        const float logit = dot(q, k) * p.scale + (HAS_RPB ? bias[-x] : 0.f);
        const float weight = sees ? exp2f((logit - *lse.at(z, y, x)) * LOG2_E) : 0.f;
        const float grad_logit = weight * (dot(g, v) - *delta.at(z, y, x));
        grad_k.add(q, grad_logit), grad_v.add(g, weight);
      }
    }
}

// `token.map.head` is the first of the heads whose gradients are summed.
__device__ inline void differentiate_key(const Params& p, const Token& token) {
  Submap map = token.map;
  QueryItems k, grad_k;
  ValueItems v, grad_v;
  k.load(Rows<const Storage>(p, KEY, map).at(token.z, token.y, token.x));
  v.load(Rows<const Storage>(p, VALUE, map).at(token.z, token.y, token.x));
  grad_k.clear(), grad_v.clear();
  for (int i = 0; i < p.tensors[GRAD_KEY].group; ++i, ++map.head) add_queries(p, token, map, k, v, grad_k, grad_v);
  if (!token.is_there) return;
  map = token.map;
  grad_k.store(Rows<Storage>(p, GRAD_KEY, map).at(token.z, token.y, token.x), p.scale);
  grad_v.store(Rows<Storage>(p, GRAD_VALUE, map).at(token.z, token.y, token.x), 1.f);
}

}  // namespace natten

NATTEN_KERNEL(natten_grad_query, natten::THREADS) {
  using namespace natten;
  __shared__ float grad_logits[GROUPS * SLOTS], sums[TableGradient::SHARED];
  const int head = blockIdx.x % p.heads, part = blockIdx.x / p.heads;
  int first, end;
  share_of(p, part, first, end);
  Token token;
  if (!p.partial_rpb) {
    for (int piece = first; piece < end; ++piece)
      if (token.locate(p, piece, head)) differentiate_query(p, token, nullptr, nullptr);
    return;
  }
  TableGradient table(p, head, part, sums);
  for (int piece = first; piece < end; ++piece)
    if (token.locate(p, piece, head)) differentiate_query(p, token, grad_logits, &table);
  table.finish();
}

// `p.heads` is the number of heads of GRAD_KEY.
NATTEN_KERNEL(natten_grad_key_value, natten::THREADS) {
  natten::Token token;
  const int head = blockIdx.x % p.heads * p.tensors[natten::GRAD_KEY].group;
  if (token.locate(p, blockIdx.x / p.heads, head)) natten::differentiate_key(p, token);
}
