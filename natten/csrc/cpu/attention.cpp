// Fused attention, forward and backward: NAT, section 3 (arXiv:2204.07143). As in FlashAttention (arXiv:2205.14135), only
// the output and the logsumexp are saved for the backward pass, which recomputes the weights.
#include <cfloat>
#include <cmath>

#include "export.h"
#include "run.h"

namespace natten {

// ---------------------------------------------------------------------------------------------------------------------
// Forward
// ---------------------------------------------------------------------------------------------------------------------

// The online softmax of several rows. Weights are relative to `largest`, the largest logit of the first visit, unless a
// later logit is so much larger that they could overflow. Lanes are independent.
struct Softmax {
  static constexpr float MOST = 8.f;
  Vec largest, sum;

  void clear() { largest = broadcast(-FLT_MAX), sum = Vec{}; }

  // Converts logits to weights. Returns whether previous sums must be multiplied by `factor`, which is set only then.
  NATTEN_INLINE bool add(float* s, int keys, Vec& factor) {
    Vec top = load(s);
    for (int j = 1; j < keys; ++j) top = maximum(top, load(s + j * W));
    const auto exceeds = top > largest + MOST;
    const bool is_larger = any(exceeds);
    if (is_larger) {
      const Vec before = largest;
      largest = select(exceeds, top, largest);
      factor = exp(before - largest);
      sum *= factor;
    }
    Vec total = {};
    for (int j = 0; j < keys; ++j) {
      const Vec weight = exp(load(s + j * W) - largest);
      store(s + j * W, weight);
      total += weight;
    }
    sum += total;
    return is_larger;
  }
};

template <class Map>
class Forward {
 public:
  static Needs needs() { return {{true, false}, {false, true}, {false, false}}; }

  Forward(const Call& call, Map& map, Scratch& scratch)
      : plan_(*call.plan), functions_(row_functions(plan_.dtype)), query_(scratch, plan_.dim),
        out_(scratch, plan_.dim, false), weights_(map.weights(scratch.take_zeros(map.weights_size()))) {}

  void start(Map& map, const Submap& submap) {
    map_ = &map;
    query_view_ = submap.view(QUERY, functions_.size);
    out_view_ = submap.view(OUT, functions_.size);
    lse_view_ = submap.view(LSE, sizeof(float));
  }

  void operator()(const Block& block) {
    query_.load(block, query_view_, functions_, static_cast<float>(plan_.scale));
    out_.zero(block);
    for (int r = 0; r < block.rows; ++r) softmax_[r].clear();
    map_->for_each_visit([&](const auto& visit) {
      map_->dot(visit, query_, KEYS, true, weights_);
      for (int r = 0; r < visit.rows; ++r) {
        Vec factor;
        if (softmax_[visit.first_row + r].add(weights_[r], visit.keys, factor)) rescale(visit.first_row + r, factor);
      }
      map_->gather(visit, weights_, VALUES, out_);
    });
    finish(block);
  }

 private:
  const Plan& plan_;
  const RowFunctions functions_;
  Map* map_ = nullptr;
  BlockRows query_, out_;
  Rows weights_;
  View query_view_, out_view_, lse_view_;
  Softmax softmax_[MAX_ROWS];

  void rescale(int r, Vec factor) {
    for (int lane = 0; lane < W; ++lane) {
      float* row = out_.lane_of_rows(r, lane)[0];
      for (int d = 0; d < out_.padded; d += W) natten::store(row + d, natten::load(row + d) * factor[lane]);
    }
  }

  void finish(const Block& block) {
    float inverse[MAX_ROWS][W], lse[W];
    for (int r = 0; r < block.rows; ++r) {
      natten::store(inverse[r], 1.f / softmax_[r].sum);
      natten::store(lse, softmax_[r].largest + log(softmax_[r].sum));
      for (int lane = 0; lane < block.lanes[r]; ++lane)
        *reinterpret_cast<float*>(lse_view_.at(block.token[r][lane])) = lse[lane];
    }
    out_.store(block, out_view_, functions_, inverse);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Backward
// ---------------------------------------------------------------------------------------------------------------------

template <class Map>
class Backward {
 public:
  static Needs needs() { return {{true, true}, {true, false}, {true, true}}; }

  Backward(const Call& call, Map& map, Scratch& scratch)
      : plan_(*call.plan), call_(call), functions_(row_functions(plan_.dtype)), query_(scratch, plan_.dim),
        grad_out_(scratch, plan_.dim), out_(scratch, plan_.dim, false), grad_query_(scratch, plan_.dim, false),
        weights_(map.weights(scratch.take_zeros(map.weights_size()))),
        grad_logits_(map.weights(scratch.take_zeros(map.weights_size()))) {
    for (auto& row : scale_)
      for (float& lane : row) lane = static_cast<float>(plan_.scale);
  }

  void start(Map& map, const Submap& submap) {
    map_ = &map;
    query_view_ = submap.view(QUERY, functions_.size);
    out_view_ = submap.view(OUT, functions_.size);
    grad_out_view_ = submap.view(GRAD_OUT, functions_.size);
    grad_query_view_ = submap.view(GRAD_QUERY, functions_.size);
    lse_view_ = submap.view(LSE, sizeof(float));
    if (call_.tensors[GRAD_LSE]) grad_lse_view_ = submap.view(GRAD_LSE, sizeof(float));
  }

  void operator()(const Block& block) {
    query_.load(block, query_view_, functions_, static_cast<float>(plan_.scale));
    grad_out_.load(block, grad_out_view_, functions_, 1.f);
    out_.load(block, out_view_, functions_, 1.f);
    for (int r = 0; r < block.rows; ++r) sum_up(block, r);
    grad_query_.zero(block);
    map_->for_each_visit([&](const auto& visit) {
      map_->dot(visit, query_, KEYS, true, weights_);
      map_->dot(visit, grad_out_, VALUES, false, grad_logits_);
      for (int r = 0; r < visit.rows; ++r) differentiate(visit.first_row + r, weights_[r], grad_logits_[r], visit.keys);
      if (call_.grad_rpb) map_->add_bias_gradient(visit, grad_logits_);
      map_->scatter(visit, weights_, grad_out_, VALUES);
      map_->scatter(visit, grad_logits_, query_, KEYS);
      map_->gather(visit, grad_logits_, KEYS, grad_query_);
    });
    grad_query_.store(block, grad_query_view_, functions_, scale_);
  }

 private:
  const Plan& plan_;
  const Call& call_;
  const RowFunctions functions_;
  Map* map_ = nullptr;
  BlockRows query_, grad_out_, out_, grad_query_;
  Rows weights_, grad_logits_;
  View query_view_, out_view_, grad_out_view_, grad_query_view_, lse_view_, grad_lse_view_;
  float scale_[MAX_ROWS][W];
  Vec lse_[MAX_ROWS], delta_[MAX_ROWS];

  // Sets the logsumexp of a row's queries, infinite in lanes without a query, so that their weights are 0; and `delta`, the
  // sum over keys of each weight times its gradient, which equals out * grad_out, summed over head_dim, minus grad_lse.
  void sum_up(const Block& block, int r) {
    float lse[W], delta[W];
    for (int lane = 0; lane < W; ++lane) {
      lse[lane] = INFINITY, delta[lane] = 0;
      if (lane >= block.lanes[r]) continue;
      const Token& t = block.token[r][lane];
      lse[lane] = *reinterpret_cast<const float*>(lse_view_.at(t));
      Vec product = {};
      const float *out = out_.lane_of_rows(r, lane)[0], *grad = grad_out_.lane_of_rows(r, lane)[0];
      for (int d = 0; d < out_.padded; d += W) product += natten::load(out + d) * natten::load(grad + d);
      delta[lane] = total(product);
      if (call_.tensors[GRAD_LSE]) delta[lane] -= *reinterpret_cast<const float*>(grad_lse_view_.at(t));
    }
    lse_[r] = natten::load(lse), delta_[r] = natten::load(delta);
  }

  // Converts logits to weights, and gradients of weights to gradients of logits.
  NATTEN_INLINE void differentiate(int r, float* p, float* ds, int keys) {
    const Vec lse = lse_[r], delta = delta_[r];
    for (int j = 0; j < keys * W; j += W) {
      const Vec weight = exp(natten::load(p + j) - lse);
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
