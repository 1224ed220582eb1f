// The Map for small submaps whose window is the whole submap: ordinary attention, where all queries see the same keys.
#pragma once

#include <vector>

#include "bias.h"
#include "block.h"

namespace natten {

class DenseMap {
 public:
  // This Map stores the bias of all pairs. If there are more, LineMap is used.
  static constexpr int MAX_TOKENS = 256;

  static bool fits(const Plan& plan, const int (&n)[3]) {
    int64_t tokens = 1;
    for (int i = 0; i < 3; ++i) {
      const Axis& axis = plan.axis[i];
      if (n[i] != axis.kernel_size || axis.is_causal) return false;
      tokens *= std::min(n[i], MAX_TOKENS + 1);
    }
    return tokens <= MAX_TOKENS;
  }

  using Shared = Bias;

  // Requires a problem that `fits` for some submap; those submaps have kernel_size tokens per axis.
  DenseMap(const Call& call, const Needs& needs, Bias& bias, Scratch& scratch, const Strips&)
      : plan_(*call.plan), bias_(bias), functions_(row_functions(plan_.dtype)), dim_(plan_.dim),
        padded_(round_up(dim_, W)) {
    tokens_ = 1;
    for (int i = 0; i < 3; ++i) tokens_ *= n_[i] = plan_.axis[i].kernel_size;
    rows_ = (tokens_ + W - 1) / W;
    for (int side : {KEYS, VALUES}) {
      if (needs.dot[side] || needs.gather[side]) rows_of_[side] = scratch.take(size_t(tokens_) * padded_);
      if (needs.grad[side]) gradient_[side] = scratch.take(size_t(tokens_) * padded_);
    }
    zeros_ = scratch.take_zeros(size_t(tokens_) * W);
    ones_ = scratch.take(n_[2]);
    std::fill_n(ones_, n_[2], 1.f);
    token_.reserve(tokens_);
    for (int z = 0; z < n_[0]; ++z)
      for (int y = 0; y < n_[1]; ++y)
        for (int x = 0; x < n_[2]; ++x) token_.push_back({z, y, x});
    for (int row = 0; row < rows_; ++row) bias_.add_kind(bias_entries(row));
  }

  // A line of keys. All rows of the block see it.
  struct Visit {
    int first_key, first_row, rows, keys;
  };
  static constexpr int MOST_KEYS = 64;

  int64_t weights_size() const { return int64_t(MAX_ROWS) * uncrowded(MOST_KEYS) * W; }
  Rows weights(float* memory) const { return {memory, int64_t(uncrowded(MOST_KEYS)) * W}; }

  // `head`: its index in the bias.
  void begin(const Submap& submap, int, int head) { submap_ = submap, head_ = head; }

  int bands() const { return 1; }

  template <class Function>
  void for_each_block(int, const Function& function) {
    for (int side : {KEYS, VALUES}) {
      if (rows_of_[side]) load(submap_.view(SIDE_TENSOR[side], functions_.size), rows_of_[side]);
      if (gradient_[side]) std::memset(gradient_[side], 0, sizeof(float) * tokens_ * padded_);
    }
    for (int i = 0; i < blocks(); ++i) {
      set_block(rows_ * i / blocks(), rows_ * (i + 1) / blocks());
      function(block_);
    }
    for (int side : {KEYS, VALUES})
      if (gradient_[side]) store(gradient_[side], submap_.view(SIDE_GRADIENT[side], functions_.size));
  }

  void end() {}

  template <class Function>
  NATTEN_INLINE void for_each_visit(const Function& function) const {
    for_each_part(tokens_, MOST_KEYS, [&](int first, int count) { function(Visit{first, 0, block_.rows, count}); });
  }

  void dot(const Visit& visit, const BlockRows& query, Side side, bool is_biased, Rows s) {
    const ConstRows bias = is_biased ? bias_rows(visit.first_key) : ConstRows{zeros_, 0};
    const ConstRows keys{rows_of_[side] + visit.first_key * padded_, padded_};
    dot_rows<SHARED>({dim_, query.transposed_rows(0), keys, IntVec{}, bias, s}, visit.rows, visit.keys);
  }

  void gather(const Visit& visit, Rows s, Side side, const BlockRows& out) {
    for_each_piece(padded_, [&](int d, auto vectors) {
      const ConstRows values{rows_of_[side] + visit.first_key * padded_ + d, padded_};
      for (int lane = 0; lane < W; ++lane) {
        int rows = visit.rows;
        while (rows > 0 && block_.lanes[rows - 1] <= lane) --rows;  // the last one may be short
        if (!rows) break;
        const Rows sums = out.lane_of_rows(0, lane);
        with_constant<MAX_ROWS>(rows, [&](auto n) {
          natten::gather<n, vectors>(visit.keys, {s.first + lane, s.stride}, values, {sums.first + d, sums.stride});
        });
      }
    });
  }

  void scatter(const Visit& visit, Rows s, const BlockRows& query, Side side) {
    for_each_piece(padded_, [&](int d, auto vectors) {
      for_each_part(visit.keys, SCATTER_KEYS, [&](int first, int count) {
        const Rows gradients{gradient_[side] + (visit.first_key + first) * padded_ + d, padded_};
        with_constant<SCATTER_KEYS>(count, [&](auto n) {
          for (int r = 0; r < visit.rows; ++r)
            natten::scatter<n, vectors>(block_.lanes[r], {s[r] + first * W, 1},
                                        {query.lane_of_rows(r, 0).first + d, padded_}, gradients);
        });
      });
    });
  }

  void add_bias_gradient(const Visit& visit, Rows s) {
    for (int r = 0; r < visit.rows; ++r) {
      float* to = bias_.gradient(head_, first_row_ + r) + visit.first_key * W;
      for (int j = 0; j < visit.keys * W; j += W) natten::store(to + j, natten::load(to + j) + natten::load(s[r] + j));
    }
  }

  int first_slot(const Visit& visit, int, int, int* count) const {
    *count = visit.keys;
    return visit.first_key;
  }

 private:
  const Plan& plan_;
  Bias& bias_;
  const RowFunctions functions_;
  const int dim_, padded_;
  int n_[3], tokens_, rows_;
  float *rows_of_[2] = {}, *gradient_[2] = {}, *zeros_, *ones_;
  std::vector<Token> token_;
  Block block_;
  Submap submap_;
  int first_row_ = 0, head_ = 0;

  // Without a table, all rows have the same bias of 0.
  ConstRows bias_rows(int first_key) const {
    const float* first = bias_.value(head_, bias_.has_table() ? first_row_ : 0);
    return {first + first_key * W, bias_.has_table() ? bias_.stride() : 0};
  }

  std::vector<int> bias_entries(int row) const {
    std::vector<int> entry(size_t(tokens_) * W);
    if (!bias_.has_table()) return entry;
    int query[W];
    for (int lane = 0; lane < W; ++lane) query[lane] = place_in_table(token_[std::min(row * W + lane, tokens_ - 1)]);
    const int middle = place_in_table({n_[0] - 1, n_[1] - 1, n_[2] - 1});
    for (int j = 0; j < tokens_; ++j) {
      const int key = place_in_table(token_[j]) + middle;
      for (int lane = 0; lane < W; ++lane) entry[size_t(j) * W + lane] = key - query[lane];
    }
    return entry;
  }

  // The index in the table is linear in key - query.
  int place_in_table(const Token& t) const { return (t.z * (2 * n_[1] - 1) + t.y) * (2 * n_[2] - 1) + t.x; }

  int blocks() const { return (rows_ + MAX_ROWS - 1) / MAX_ROWS; }

  // Calls function(row, token) for each line of tokens, at [tokens][padded] rows.
  template <class Function>
  void for_each_line(float* rows, const Function& function) const {
    for (int i = 0; i < tokens_; i += n_[2]) function(rows + i * padded_, token_[i]);
  }

  void load(const View& from, float* to) const {
    for_each_line(to, [&](float* rows, const Token& first) {
      functions_.load(from.at(first), from.step[2], n_[2], dim_, padded_, 1.f, rows);
    });
  }

  void store(float* from, const View& to) const {
    for_each_line(from, [&](const float* rows, const Token& first) {
      functions_.store(rows, padded_, n_[2], dim_, ones_, to.at(first), to.step[2]);
    });
  }

  void set_block(int first_row, int end_row) {
    first_row_ = first_row;
    block_.rows = end_row - first_row;
    for (int r = 0; r < block_.rows; ++r) {
      const int first = (first_row + r) * W;
      block_.lanes[r] = std::min(W, tokens_ - first);
      for (int lane = 0; lane < block_.lanes[r]; ++lane) block_.token[r][lane] = token_[first + lane];
    }
  }
};

}  // namespace natten
