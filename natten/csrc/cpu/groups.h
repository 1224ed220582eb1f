// Groups of adjacent queries of a line, and the bias of each.
#pragma once

#include <algorithm>
#include <array>
#include <cstdlib>
#include <utility>
#include <vector>

#include "bias.h"
#include "products.h"
#include "submap.h"

namespace natten {

// Up to W adjacent queries of a line.
struct Group {
  int query;                // of lane 0
  int first, end;           // lanes whose queries are not in the group before
  int place;                // first key of lane 0, relative to the first stored key
  int step[W], missing[W];  // see Block
  KeyAccess access;
  int bias, bias_place;     // kind, and the place of lane 0's first key in each line of it
};

// The groups of a strip of a line, or of a dense submap. Groups whose lanes have the same steps share a kind of bias.
class Groups {
 public:
  Groups(const Plan& plan, Bias& bias) : bias_(bias) {
    for (int i = 0; i < 3; ++i) kernel_[i] = static_cast<int>(plan.axis[i].kernel_size);
    is_causal_ = plan.axis[2].is_causal;
    places_ = kernel_[2] > 2 * W ? kernel_[2] : 1;
  }

  // Vectors of a line of a kind.
  int bias_line() const { return places_ - 1 + kernel_[2]; }

  size_t size() const { return groups_.size(); }
  const Group& operator[](size_t i) const { return groups_[i]; }

  // Makes the groups of queries begin .. end - 1 of a line; `origin` is the first stored key.
  void make(const Windows& windows, int begin, int end, int origin) {
    const std::array<int, 3> line = {windows.n, begin, end};
    if (line == line_) return;
    line_ = line;
    groups_.clear();
    for (int x = begin; x < end;) {
      // The last group overlaps the one before, so that all its lanes have queries.
      int query = end - begin >= W ? std::min(x, end - W) : x;
      if (windows.first[x] - windows.first[query] >= W) query = x;
      Group group = {};
      group.query = query, group.first = x - query, group.place = windows.first[query] - origin;
      bool is_shifted = true, is_shared = true;
      for (int& lane = group.end; lane < W && query + lane < end; ++lane) {
        const int i = query + lane, step = windows.first[i] - windows.first[query];
        if (step >= W) break;
        group.step[lane] = step, group.missing[lane] = windows.missing[i];
        is_shifted &= step == lane, is_shared &= step == 0;
      }
      group.access = is_shared ? SHARED : is_shifted && group.end == W ? SHIFTED : PERMUTED;
      set_bias(group, windows);
      groups_.push_back(group);
      x = query + group.end;
    }
  }

  // Makes the groups of a dense submap, whose `tokens` tokens form a line; all its queries see all its keys.
  void make_dense(int tokens) {
    if (!groups_.empty()) return;
    for (int x = 0; x < tokens; x += W) {
      Group group = {};
      group.query = tokens >= W ? std::min(x, tokens - W) : x;
      group.first = x - group.query, group.end = std::min(W, tokens - group.query);
      group.access = SHARED;
      if (bias_.has_table() || groups_.empty()) set_dense_entries(tokens, group.query);
      group.bias = bias_.kinds() - 1;
      groups_.push_back(group);
    }
  }

 private:
  // Of a kind of bias: the first key of lane 0 relative to its query, or 0 if the kind has all of these positions; and the
  // first key of each lane relative to its query, minus that of lane 0.
  struct Pattern {
    int first;
    std::array<int, W> lane;
    bool operator==(const Pattern& other) const { return first == other.first && lane == other.lane; }
  };
  Bias& bias_;
  int kernel_[3];
  bool is_causal_;
  // Positions of lane 0's first key in a kind: one, or all of 1 - kernel_size .. 0. The windows at the ends of a line begin
  // at different positions, and if they are long, there are too many for a kind of each.
  int places_;
  std::vector<Group> groups_;
  std::array<int, 3> line_ = {-1, -1, -1};  // tokens, begin and end that groups_ is for
  std::vector<std::pair<Pattern, int>> kinds_;

  void set_bias(Group& group, const Windows& windows) {
    Pattern pattern = {};
    if (bias_.has_table() || is_causal_) {  // else the bias is 0 everywhere
      const int first = windows.first[group.query] - group.query;
      for (int lane = 0; lane < group.end; ++lane) pattern.lane[lane] = group.step[lane] - lane;
      if (places_ == 1) pattern.first = first;
      else group.bias_place = first + kernel_[2] - 1;
    }
    group.bias = kind_of(pattern);
  }

  int kind_of(const Pattern& pattern) {
    for (const auto& kind : kinds_)
      if (kind.first == pattern) return kind.second;
    set_entries(pattern);
    kinds_.push_back({pattern, bias_.kinds() - 1});
    return kinds_.back().second;
  }

  // Adds a kind with the entries of its keys, line by line of the table.
  void set_entries(const Pattern& pattern) {
    const int lines = bias_.has_table() ? (2 * kernel_[0] - 1) * (2 * kernel_[1] - 1) : 1, width = 2 * kernel_[2] - 1;
    const int first = places_ == 1 ? pattern.first : 1 - kernel_[2];
    int* entry = bias_.add_kind(int64_t{lines} * bias_line());
    for (int t = 0; t < lines; ++t)
      for (int j = 0; j < bias_line(); ++j)
        for (int lane = 0; lane < W; ++lane, ++entry) {
          const int position = first + pattern.lane[lane] + j;  // of the key, relative to the query
          const bool is_seen = std::abs(position) < kernel_[2] && (!is_causal_ || position <= 0);
          *entry = !is_seen ? -1 : bias_.has_table() ? t * width + position + kernel_[2] - 1 : 0;
        }
  }

  void set_dense_entries(int tokens, int query) {
    int* entry = bias_.add_kind(tokens);
    std::vector<int> place;  // in the table: the index is linear in key - query
    for (int z = 0; z < kernel_[0]; ++z)
      for (int y = 0; y < kernel_[1]; ++y)
        for (int x = 0; x < kernel_[2]; ++x) place.push_back((z * (2 * kernel_[1] - 1) + y) * (2 * kernel_[2] - 1) + x);
    for (int lane = 0; lane < W; ++lane) {
      const int first = place.back() - place[std::min(query + lane, tokens - 1)];
      for (int j = 0; j < tokens; ++j) entry[j * W + lane] = first + place[j];
    }
  }
};

}  // namespace natten
