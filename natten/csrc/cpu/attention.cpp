// Fused attention, forward and backward: NAT, section 3 (arXiv:2204.07143). As in FlashAttention (arXiv:2205.14135), only
// the output and the logsumexp are saved for the backward pass, which recomputes the weights.
#include <algorithm>
#include <cmath>

#include "export.h"
#include "run.h"

namespace natten {

constexpr float LOG2_E = 1.44269504f;

// Logits, and the bias, are multiplied by log2(e), so that weights are powers of two. The logits of whole windows are stored
// before the softmax; an online softmax was not faster, even for windows that do not fit into the cache.
class Forward {
 public:
  static constexpr float BIAS_FACTOR = LOG2_E;
  static Needs needs() { return {{true, false}, {false, true}, {false, false}}; }

  Forward(const Call& call, Map& map, Scratch& scratch)
      : plan_(*call.plan), map_(map), functions_(row_functions(plan_.dtype)), query_(scratch, plan_.dim, true),
        out_(scratch, plan_.value_dim, false), weights_(scratch, map.slots(), true) {}

  void start(const Submap& submap, int64_t head) {
    query_view_ = submap.view(QUERY, head, functions_.size);
    out_view_ = submap.view(OUT, head, functions_.size);
    lse_view_ = submap.view(LSE, head, sizeof(float));
  }

  void operator()(const Block& block) {
    query_.load(block, query_view_, functions_, static_cast<float>(plan_.scale), LOG2_E);
    if (block.has_missing)
      for (int r = 0; r < block.rows; ++r) std::fill_n(weights_.row(r), int64_t{map_.slots()} * W, -INFINITY);
    for (const Visit& visit : block.visits) map_.dot(visit, query_, KEYS, true, weights_);
    float inverse[MAX_ROWS][W], lse[MAX_ROWS][W];
    for (int r = 0; r < block.rows; ++r) softmax(weights_.row(r), map_.slots(), inverse[r], lse[r]);
    out_.zero(block);
    for (const Visit& visit : block.visits) map_.gather(visit, weights_, VALUES, out_);
    out_.store(block, out_view_, functions_, inverse);
    for_each_query(block, lse_view_, [&](char* to, int r, int lane) { *reinterpret_cast<float*>(to) = lse[r][lane]; });
  }

 private:
  const Plan& plan_;
  Map& map_;
  const RowFunctions functions_;
  QueryRows query_, out_;
  Weights weights_;
  View query_view_, out_view_, lse_view_;

  // Converts logits to weights, without the factor 1 / sum.
  static void softmax(float* s, int keys, float* inverse, float* lse) {
    Vec even = natten::load(s), odd = even;  // two independent chains
    for (int j = 1; j + 1 < keys; j += 2) {
      even = maximum(even, natten::load(s + j * W));
      odd = maximum(odd, natten::load(s + (j + 1) * W));
    }
    const Vec largest = maximum(maximum(even, odd), natten::load(s + (keys - 1) * W));
    const auto weight = [&](int j) __attribute__((always_inline)) {
      const Vec x = exp2(natten::load(s + j * W) - largest);
      natten::store(s + j * W, x);
      return x;
    };
    even = odd = Vec{};
    for (int j = 0; j + 1 < keys; j += 2) even += weight(j), odd += weight(j + 1);
    if (keys % 2) even += weight(keys - 1);
    const Vec sum = even + odd;
    natten::store(inverse, 1.f / sum);
    natten::store(lse, largest * LN_2 + log(sum));
  }
};

class Backward {
 public:
  static constexpr float BIAS_FACTOR = LOG2_E;
  static Needs needs() { return {{true, true}, {true, false}, {true, true}}; }

  Backward(const Call& call, Map& map, Scratch& scratch)
      : plan_(*call.plan), call_(call), map_(map), functions_(row_functions(plan_.dtype)), query_(scratch, plan_.dim, true),
        grad_query_(scratch, plan_.dim, false), grad_out_(scratch, plan_.value_dim, true),
        out_(scratch, plan_.value_dim, false), weights_(scratch, Map::MOST_KEYS, false),
        grad_logits_(scratch, Map::MOST_KEYS, false) {
    for (auto& row : scale_) std::fill_n(row, W, static_cast<float>(plan_.scale));
  }

  void start(const Submap& submap, int64_t head) {
    query_view_ = submap.view(QUERY, head, functions_.size);
    out_view_ = submap.view(OUT, head, functions_.size);
    grad_out_view_ = submap.view(GRAD_OUT, head, functions_.size);
    grad_query_view_ = submap.view(GRAD_QUERY, head, functions_.size);
    lse_view_ = submap.view(LSE, head, sizeof(float));
    if (call_.tensors[GRAD_LSE]) grad_lse_view_ = submap.view(GRAD_LSE, head, sizeof(float));
  }

  void operator()(const Block& block) {
    query_.load(block, query_view_, functions_, static_cast<float>(plan_.scale), LOG2_E);
    grad_out_.load(block, grad_out_view_, functions_, 1.f);
    out_.load(block, out_view_, functions_, 1.f);
    prepare(block);
    grad_query_.zero(block);
    for (const Visit& visit : block.visits) {
      map_.dot(visit, query_, KEYS, true, weights_);
      map_.dot(visit, grad_out_, VALUES, false, grad_logits_);
      for (int r = visit.first_row; r < visit.first_row + visit.rows; ++r) differentiate(r, visit.keys);
      if (call_.grad_rpb) map_.add_bias_gradient(visit, grad_logits_);
      map_.scatter(visit, weights_, grad_out_, VALUES);
      map_.scatter(visit, grad_logits_, query_, KEYS);
      map_.gather(visit, grad_logits_, KEYS, grad_query_);
    }
    grad_query_.store(block, grad_query_view_, functions_, scale_);
  }

 private:
  const Plan& plan_;
  const Call& call_;
  Map& map_;
  const RowFunctions functions_;
  QueryRows query_, grad_query_, grad_out_, out_;
  Weights weights_, grad_logits_;
  View query_view_, out_view_, grad_out_view_, grad_query_view_, lse_view_, grad_lse_view_;
  float scale_[MAX_ROWS][W];
  float lse_[MAX_ROWS][W], delta_[MAX_ROWS][W];

  // Sets the logsumexp of the queries, infinite in lanes without one, so that their weights are 0; and `delta`, the sum
  // over keys of each weight times its gradient, which equals out * grad_out, summed over d, minus grad_lse.
  void prepare(const Block& block) {
    for (int r = 0; r < block.rows; ++r) {
      std::fill_n(lse_[r], W, INFINITY);
      for (int lane = 0; lane < W; ++lane) {
        Vec product = {};
        const float *out = out_.lane(r, lane), *grad = grad_out_.lane(r, lane);
        for (int d = 0; d < out_.padded; d += W) product += natten::load(out + d) * natten::load(grad + d);
        delta_[r][lane] = total(product);
      }
    }
    for_each_query(block, lse_view_, [&](const char* from, int r, int lane) {
      lse_[r][lane] = LOG2_E * *reinterpret_cast<const float*>(from);
    });
    if (!call_.tensors[GRAD_LSE]) return;
    for_each_query(block, grad_lse_view_, [&](const char* from, int r, int lane) {
      delta_[r][lane] -= *reinterpret_cast<const float*>(from);
    });
  }

  // Converts logits to weights, and gradients of weights to gradients of logits.
  void differentiate(int r, int keys) {
    const Vec lse = natten::load(lse_[r]), delta = natten::load(delta_[r]);
    float *p = weights_.row(r), *ds = grad_logits_.row(r);
#pragma GCC unroll 2
    for (int j = 0; j < keys * W; j += W) {
      const Vec weight = exp2(natten::load(p + j) - lse);
      natten::store(p + j, weight);
      natten::store(ds + j, weight * (natten::load(ds + j) - delta));
    }
  }
};

}  // namespace natten

NATTEN_EXPORT int natten_attention(const natten::Plan* plan, void* const* tensors, const float* rpb, float*, int threads) {
  return natten::run<natten::Forward>({plan, tensors, rpb, nullptr, threads});
}

NATTEN_EXPORT int natten_attention_backward(const natten::Plan* plan, void* const* tensors, const float* rpb,
                                            float* grad_rpb, int threads) {
  return natten::run<natten::Backward>({plan, tensors, rpb, grad_rpb, threads});
}
