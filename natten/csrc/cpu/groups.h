// Groups of adjacent queries of a line, and the bias of each.
#pragma once

#include <array>
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
  int bias;                 // kind
};

// The groups of a strip of a line, or of a dense submap. Groups whose windows lie alike have the same kind of bias.
class Groups {
 public:
  Groups(const Plan& plan, Bias& bias) : bias_(bias) {
    for (int i = 0; i < 3; ++i) kernel_[i] = static_cast<int>(plan.axis[i].kernel_size);
  }

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
      group.bias = kind_of(pattern_of(group, windows));
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
  // The first key of each lane relative to its query, if there is a table, and its number of keys.
  typedef std::array<int, 2 * W> Pattern;
  Bias& bias_;
  int kernel_[3];
  std::vector<Group> groups_;
  std::array<int, 3> line_ = {-1, -1, -1};  // tokens, begin and end that groups_ is for
  std::vector<std::pair<Pattern, int>> kinds_;

  // Lanes without a query repeat the first.
  Pattern pattern_of(const Group& group, const Windows& windows) const {
    Pattern pattern;
    for (int lane = 0; lane < W; ++lane) {
      const int i = group.query + (lane < group.end ? lane : 0);
      pattern[lane] = bias_.has_table() ? windows.first[i] - i : 0;
      pattern[W + lane] = windows.end[i] - windows.first[i];
    }
    return pattern;
  }

  int kind_of(const Pattern& pattern) {
    for (const auto& kind : kinds_)
      if (kind.first == pattern) return kind.second;
    set_entries(pattern);
    kinds_.push_back({pattern, bias_.kinds() - 1});
    return kinds_.back().second;
  }

  // Adds a kind with the entries of the keys of a group, line by line of the table.
  void set_entries(const Pattern& pattern) {
    const int lines = bias_.has_table() ? (2 * kernel_[0] - 1) * (2 * kernel_[1] - 1) : 1, width = 2 * kernel_[2] - 1;
    int* entry = bias_.add_kind(int64_t(lines) * kernel_[2]);
    for (int t = 0; t < lines; ++t)
      for (int j = 0; j < kernel_[2]; ++j)
        for (int lane = 0; lane < W; ++lane) {
          const int which = bias_.has_table() ? t * width + pattern[lane] + j + kernel_[2] - 1 : 0;
          entry[(int64_t(t) * kernel_[2] + j) * W + lane] = j < pattern[W + lane] ? which : -1;
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
