// Divides a strip of a submap into blocks of queries, and lists the visits of each: keys of a line, and the rows that see
// them.
//
// Rows of a block are lines above each other, of which it has the same W queries. On a map of a single line, they are
// neighboring groups of W queries. A small submap whose window is the whole submap is treated as a single line, too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "groups.h"
#include "keys.h"
#include "prefetch.h"

namespace natten {

// Submaps are cut into `count` strips along `axis`.
struct Strips {
  int axis, count;

  // The first of n tokens in a strip. On the last axis, strips begin with a whole group of queries.
  int begin(int n, int strip) const {
    const int first = static_cast<int>(int64_t(n) * strip / count);
    return axis == 2 && strip < count ? first / W * W : first;
  }
};

// A strip of a submap, and heads of keys.
struct Task {
  Submap submap;
  int64_t head;
  int heads, strip;
};

class Map {
 public:
  static constexpr int MOST_KEYS = 64;            // of a visit
  static constexpr int MOST_DENSE_KEYS = 256;      // a dense submap has the bias of all pairs

  // Whether the window is the whole submap, which is small.
  static bool is_dense(const Plan& plan, const int (&n)[3]) {
    int64_t tokens = 1;
    for (int i = 0; i < 3; ++i) {
      const Axis& axis = plan.axis[i];
      if (n[i] != axis.kernel_size || axis.is_causal) return false;
      tokens *= std::min(n[i], MOST_DENSE_KEYS + 1);
    }
    return tokens <= MOST_DENSE_KEYS;
  }

  // heads: of keys, that are processed together; dense: whether all submaps are dense.
  Map(const Call& call, const Needs& needs, Bias& bias, Scratch& scratch, Strips strips, int heads, bool dense)
      : plan_(*call.plan), needs_(needs), bias_(bias), dense_(dense),
        is_one_line_(dense || (plan_.axis[0].length == 1 && plan_.axis[1].length == 1)), strips_(strips),
        groups_(plan_, bias) {
    slots_ = 1;
    for (int i = 0; i < 3; ++i) slots_ *= kernel_[i] = static_cast<int>(plan_.axis[i].kernel_size);
    line_keys_ = dense ? slots_ : kernel_[2];
    for (int h = 0; h < heads; ++h) keys_.emplace_back(call, needs, scratch, ring_lines(), most_tokens());
    zeros_ = scratch.take_zeros(size_t(MOST_KEYS) * W);
  }

  int slots() const { return slots_; }             // keys of a query
  int keys_of_line() const { return line_keys_; }  // those on a line

  // Runs all blocks of a task. Calls op.start(submap, head) for each band and head of queries, then op(block) for each
  // block. Prefetches the task `next`, unless it is null.
  template <class Operator>
  void run(const Task& task, const Task* next, Operator& op) {
    const Submap& submap = task.submap;
    const int64_t sharing = plan_.heads / plan_.kv_heads;
    for (int h = 0; h < task.heads; ++h) keys_[h].begin(submap, task.head + h);
    heads_ = task.heads;
    choose_range(submap, task.strip);
    for (int i = 0; i < bands(); ++i) {
      const Band band = band_of(i);
      drop_lines(first_kept_line(band));
      load_lines(end_of_lines(band));
      if (i + 1 < bands()) prefetch_lines(task, loaded_lines_, end_of_lines(band_of(i + 1)));
      else if (next) prefetch_first_lines(*next);
      for (int64_t head = task.head * sharing; head < (task.head + task.heads) * sharing; ++head) {
        head_ = head, head_keys_ = &keys_[head / sharing - task.head];
        op.start(submap, head);
        for (size_t g = 0; g < groups_.size();) {
          const int rows = is_one_line_ ? rows_from(g) : band.rows;
          make_block(band, g, rows);
          op(block_);
          g += is_one_line_ ? rows : 1;
        }
      }
    }
    drop_lines(loaded_lines_);
  }

  // s = query . key, plus the bias if is_biased
  void dot(const Visit& visit, const QueryRows& query, Side side, bool is_biased, const Weights& s) {
    DotArguments a;
    a.dim = (query.dim + 3) / 4 * 4;
    a.q = query.transposed + visit.first_row * W;
    a.k = head_keys_->transposed(side, visit.line, visit.place);
    a.k_stride = head_keys_->stride();
    a.index = block_.index;
    for (int r = 0; r < visit.rows; ++r) {
      a.bias[r] = is_biased ? visit.bias[r] : zeros_;
      a.s[r] = s.at(visit, r);
    }
    natten::dot(a, block_.access, visit.rows, visit.keys);
  }

  // out += s . value
  void gather(const Visit& visit, const Weights& s, Side side, const QueryRows& out) {
    for_each_window<float>(visit, s, out, [&](const auto& a) {
      natten::gather(a, visit.keys, head_keys_->natural(side, visit.line, visit.place));
    });
  }

  // gradient of the keys or values += s . query
  void scatter(const Visit& visit, const Weights& s, const QueryRows& query, Side side) {
    for_each_window<const float>(visit, s, query, [&](const auto& a) {
      natten::scatter(a, visit.keys, head_keys_->gradient(side, visit.line, visit.place));
    });
  }

  // gradient of the bias += s
  void add_bias_gradient(const Visit& visit, const Weights& s) {
    for (int r = 0; r < visit.rows; ++r) {
      float* to = visit.grad_bias[r];
      const float* from = s.at(visit, r);
      for (int j = 0; j < visit.keys * W; j += W) store(to + j, natten::load(to + j) + natten::load(from + j));
    }
  }

 private:
  const Plan& plan_;
  const Needs needs_;
  Bias& bias_;
  const bool dense_, is_one_line_;
  const Strips strips_;
  Groups groups_;
  int kernel_[3], slots_, line_keys_;  // sizes of the window; keys of a query; those on a line
  float* zeros_;
  std::vector<KeyLines> keys_;  // of each head of the task
  Prefetcher prefetcher_;

  int n_[3] = {};
  int heads_ = 0;  // of the task
  Windows windows_[3];
  int begin_[3] = {}, end_[3] = {};        // queries of the strip
  int origin_ = 0, key_end_ = 0;           // stored keys of a line
  int kept_lines_ = 0, loaded_lines_ = 0;  // the ring holds lines kept_lines_ .. loaded_lines_ - 1
  int own_begin_ = 0, own_end_ = 0;  // keys, along the axis of strips, whose gradients this strip writes; it adds to others

  int64_t head_ = 0;               // of the queries of the block
  KeyLines* head_keys_ = nullptr;  // its keys
  Block block_;

  // --- lines of keys -------------------------------------------------------------------------------------------------

  // Tokens of the longest residue class.
  int tokens(int i) const { return (plan_.axis[i].length + plan_.axis[i].dilation - 1) / plan_.axis[i].dilation; }

  int most_tokens() const {
    if (dense_) return slots_;
    if (strips_.axis != 2) return tokens(2);
    return std::min(tokens(2), tokens(2) / strips_.count + W + 2 * kernel_[2] + 1);
  }

  int ring_lines() const {
    if (is_one_line_) return 1;
    if (plan_.axis[0].length > 1) return std::min(tokens(0), kernel_[0]) * tokens(1);
    return std::min<int>(tokens(1), kernel_[1] + MAX_ROWS + plan_.axis[1].stride);
  }

  // Adjacent lines of queries.
  struct Band {
    int z, y, rows;
  };

  int bands_per_plane() const { return (end_[1] - begin_[1] + MAX_ROWS - 1) / MAX_ROWS; }
  int bands() const { return is_one_line_ ? 1 : (end_[0] - begin_[0]) * bands_per_plane(); }

  // Bands of a plane have nearly equal heights.
  Band band_of(int i) const {
    if (is_one_line_) return {0, 0, 1};
    const int count = bands_per_plane(), lines = end_[1] - begin_[1];
    const auto line_of = [&](int band) { return static_cast<int>(int64_t{lines} * band / count); };
    const int first = line_of(i % count);
    return {begin_[0] + i / count, begin_[1] + first, line_of(i % count + 1) - first};
  }

  int line(int z, int y) const { return z * n_[1] + y; }

  // One past the last line that a band needs.
  int end_of_lines(const Band& b) const {
    return is_one_line_ ? 1 : line(windows_[0].end[b.z] - 1, windows_[1].end[b.y + b.rows - 1] - 1) + 1;
  }

  // The first line that this band or a later one needs.
  int first_kept_line(const Band& b) const {
    if (is_one_line_) return 0;
    return plan_.axis[0].length > 1 ? line(windows_[0].first[b.z], 0) : line(0, windows_[1].first[b.y]);
  }

  void choose_range(const Submap& submap, int strip) {
    for (int i = 0; i < 3; ++i) {
      n_[i] = submap.n[i];
      windows_[i].make(plan_.axis[i], n_[i]);
      begin_[i] = 0, end_[i] = n_[i];
    }
    if (dense_) {
      origin_ = 0, key_end_ = slots_;
    } else {
      const int axis = strips_.axis;
      begin_[axis] = strips_.begin(n_[axis], strip), end_[axis] = strips_.begin(n_[axis], strip + 1);
      origin_ = 0, key_end_ = n_[2];
      if (axis == 2 && strips_.count > 1) {
        origin_ = windows_[2].first[begin_[2]];
        key_end_ = windows_[2].first[end_[2] - 1] + kernel_[2];
      }
      own_begin_ = 0, own_end_ = n_[axis];
      if (strip % 2) {
        own_begin_ = windows_[axis].end[begin_[axis] - 1];
        if (strip + 1 < strips_.count) own_end_ = windows_[axis].first[end_[axis]];
      }
    }
    kept_lines_ = loaded_lines_ = first_kept_line(band_of(0));
    if (dense_) groups_.make_dense(slots_);
    else groups_.make(windows_[2], begin_[2], end_[2], origin_);
  }

  // Calls function(place, token, count) for the tokens of a line at places begin .. end - 1 that are adjacent in memory.
  template <class Function>
  void for_each_run(int which, int begin, int end, const Function& function) const {
    if (!dense_) return function(begin, Token{which / n_[1], which % n_[1], origin_ + begin}, end - begin);
    for (int i = begin, next; i < end; i = next) {
      next = std::min(end, (i / n_[2] + 1) * n_[2]);
      function(i, Token{i / n_[2] / n_[1], i / n_[2] % n_[1], i % n_[2]}, next - i);
    }
  }

  // Loads the lines before `end`. All heads of W tokens are loaded in turn, because they are adjacent in memory.
  void load_lines(int end) {
    for (; loaded_lines_ < end; ++loaded_lines_)
      for (int begin = 0; begin < key_end_ - origin_; begin += W) {
        const int line = loaded_lines_ % keys_[0].lines(), last = std::min(begin + W, key_end_ - origin_);
        for (int side : {KEYS, VALUES})
          for_each_run(loaded_lines_, begin, last, [&](int place, const Token& token, int count) {
            for (int h = 0; h < heads_; ++h) keys_[h].load(side, line, place, token, count);
          });
        for (int h = 0; h < heads_; ++h) keys_[h].transpose(line, begin);
      }
  }

  // Prefetches as many lines of a task as this task's first band needs.
  void prefetch_first_lines(const Task& task) {
    const Submap& submap = task.submap;
    if (dense_) return prefetch_lines(task, 0, submap.n[0] * submap.n[1]);
    const int axis = strips_.axis, lines = end_of_lines(band_of(0)) - first_kept_line(band_of(0));
    const int first = axis == 2 ? 0 : std::max(0, strips_.begin(submap.n[axis], task.strip) - kernel_[axis] / 2);
    const int begin = axis == 0 ? first * submap.n[1] : first;
    prefetch_lines(task, begin, begin + lines);
  }

  // Prefetches all tensors at the tokens of lines `begin` .. `end` - 1 of a task, while gather and scatter run.
  void prefetch_lines(const Task& task, int begin, int end) {
    prefetcher_.clear();
    if (!needs_.gather[KEYS] && !needs_.gather[VALUES] && !needs_.grad[KEYS] && !needs_.grad[VALUES]) return;
    const Submap& submap = task.submap;
    Token first = {0, 0, 0};
    int tokens = submap.n[2];
    if (!dense_ && strips_.axis == 2) {
      first.x = strips_.begin(submap.n[2], task.strip);
      tokens = strips_.begin(submap.n[2], task.strip + 1) - first.x;
    }
    for (int which = begin; which < std::min(end, submap.n[0] * submap.n[1]); ++which) {
      first.z = which / submap.n[1], first.y = which % submap.n[1];
      for (TensorName name : {QUERY, KEY, VALUE, OUT, ATTN, GRAD_OUT, GRAD_ATTN, GRAD_QUERY})
        if (submap.call->tensors[name]) prefetch(task, name, first, tokens);
    }
  }

  void prefetch(const Task& task, TensorName name, const Token& first, int tokens) {
    const int64_t sharing = name == KEY || name == VALUE ? 1 : plan_.heads / plan_.kv_heads;
    const bool is_attn = name == ATTN || name == GRAD_ATTN, is_value = name == VALUE || name == OUT || name == GRAD_OUT;
    const int64_t dim = is_attn ? slots_ : is_value ? plan_.value_dim : plan_.dim;
    const int64_t head = task.head * sharing, heads = task.heads * sharing;
    const int size = element_size(plan_.dtype);
    if (plan_.strides[name].head == dim) {
      prefetcher_.add(task.submap.view(name, head, size), first, tokens, heads * dim * size);
    } else {
      for (int64_t h = head; h < head + heads; ++h)
        prefetcher_.add(task.submap.view(name, h, size), first, tokens, dim * size);
    }
  }

  // Writes the gradients of lines before `first`.
  void drop_lines(int first) {
    for (; kept_lines_ < first; ++kept_lines_)
      for (int side : {KEYS, VALUES})
        if (needs_.grad[side]) store_gradient(side, kept_lines_);
  }

  // Odd strips run in the second phase and add to the gradients that their neighbors have written.
  void store_gradient(int side, int which) const {
    const int at[2] = {which / n_[1], which % n_[1]};
    int begin = 0, end = key_end_ - origin_;  // places that are written, not added to
    if (!dense_ && strips_.axis == 2) {
      begin = std::max(own_begin_, origin_) - origin_, end = std::min(own_end_, key_end_) - origin_;
    } else if (!dense_ && (at[strips_.axis] < own_begin_ || at[strips_.axis] >= own_end_)) {
      begin = end;
    }
    const auto write = [&](int from, int to, bool is_sum) {
      for_each_run(which, from, to, [&](int place, const Token& token, int count) {
        for (int h = 0; h < heads_; ++h) keys_[h].store(side, which % keys_[0].lines(), place, token, count, is_sum);
      });
    };
    write(0, begin, true), write(begin, end, false), write(end, key_end_ - origin_, true);
  }

  // --- blocks --------------------------------------------------------------------------------------------------------

  // On a single line, returns how many groups from g on form a block: groups with the same keys, or with keys shifted by W
  // from group to group if windows are longer than W.
  int rows_from(size_t g) const {
    const Group& first = groups_[g];
    const bool is_long = first.access == SHIFTED && kernel_[2] > W;
    int rows = 1;
    for (; rows < MAX_ROWS && g + rows < groups_.size(); ++rows) {
      const Group& next = groups_[g + rows];
      if (next.access != first.access) break;
      if (first.access == SHARED && next.place == first.place) continue;
      if (!is_long || next.bias != first.bias || next.place != first.place + rows * W || next.first) break;
    }
    return rows;
  }

  void make_block(const Band& band, size_t g, int rows) {
    const Group& group = groups_[g];
    block_.rows = rows, block_.access = group.access, block_.has_missing = false;
    block_.runs.clear(), block_.visits.clear();
    for (int lane = 0; lane < W; ++lane) block_.step[lane] = block_.index[lane] = group.step[lane];
    for (int r = 0; r < rows; ++r) {
      const Group& of_row = is_one_line_ ? groups_[g + r] : group;
      block_.first[r] = of_row.first, block_.end[r] = of_row.end;
      for (int lane = 0; lane < W; ++lane) {
        block_.missing[r][lane] = of_row.missing[lane];
        block_.has_missing |= of_row.missing[lane] > 0;
      }
      if (dense_)
        for_each_run(0, of_row.query, of_row.query + of_row.end, [&](int place, const Token& token, int count) {
          block_.runs.push_back({r, place - of_row.query, count, token});
        });
      else block_.runs.push_back({r, 0, of_row.end, {band.z, band.y + (is_one_line_ ? 0 : r), of_row.query}});
    }
    if (is_one_line_) add_visits_of_line(g, rows);
    else add_visits(band, group);
  }

  void add_visits(const Band& band, const Group& group) {
    const int z = band.z, y = band.y, *first = &windows_[1].first[y], *end = &windows_[1].end[y], last = band.rows - 1;
    for (int r = 0; r <= last; ++r) block_.has_missing |= end[r] - first[r] < kernel_[1];
    block_.has_missing |= windows_[0].end[z] - windows_[0].first[z] < kernel_[0];
    const int64_t bias_line = bias_.has_table() ? int64_t{groups_.bias_line()} * W : 0;
    for (int kz = windows_[0].first[z]; kz < windows_[0].end[z]; ++kz)
      for (int ky = first[0], from = 0, to = 0; ky < end[last]; ++ky) {
        while (end[from] <= ky) ++from;
        while (to <= last && first[to] <= ky) ++to;
        if (from >= to) continue;
        for_each_part(kernel_[2], MOST_KEYS, [&](int j, int keys) {
          Visit visit = {line(kz, ky) % keys_[0].lines(), group.place + j, keys, from, to - from, {}, {}, {}};
          for (int r = 0; r < visit.rows; ++r) {
            const int of_row = y + from + r;
            const int a = kz - windows_[0].first[z] + windows_[0].missing[z];
            const int b = ky - windows_[1].first[of_row] + windows_[1].missing[of_row];
            const int dz = kz - z + kernel_[0] - 1, dy = ky - of_row + kernel_[1] - 1;
            visit.slot[r] = (a * kernel_[1] + b) * kernel_[2] + j;
            set_bias(visit, r, group, int64_t(dz * (2 * kernel_[1] - 1) + dy) * bias_line + j * W);
          }
          block_.visits.push_back(visit);
        });
      }
  }

  // Rows of a single line have windows of line_keys_ keys, which begin at the same place or W places after each other. Each
  // visit has keys that the same rows see.
  void add_visits_of_line(size_t g, int rows) {
    const Group& group = groups_[g];
    const int last = groups_[g + rows - 1].place - group.place, move = rows > 1 ? last / (rows - 1) : 0;
    int begins[MAX_ROWS], ends[MAX_ROWS], cuts[2 * MAX_ROWS];
    for (int r = 0; r < rows; ++r) begins[r] = r * move, ends[r] = r * move + line_keys_;
    std::merge(begins, begins + rows, ends, ends + rows, cuts);
    for (int i = 0; i + 1 < 2 * rows; ++i) {
      if (cuts[i] == cuts[i + 1]) continue;
      int from = 0, to = 0;
      while (from * move + line_keys_ <= cuts[i]) ++from;
      while (to < rows && to * move <= cuts[i]) ++to;
      for_each_part(cuts[i + 1] - cuts[i], MOST_KEYS, [&](int j, int keys) {
        Visit visit = {0, group.place + cuts[i] + j, keys, from, to - from, {}, {}, {}};
        for (int r = 0; r < visit.rows; ++r) {
          visit.slot[r] = cuts[i] + j - (from + r) * move;
          set_bias(visit, r, groups_[g + from + r], int64_t(visit.slot[r]) * W);
        }
        block_.visits.push_back(visit);
      });
    }
  }

  void set_bias(Visit& visit, int r, const Group& group, int64_t offset) {
    offset += int64_t{group.bias_place} * W;
    float* gradient = bias_.gradient(group.bias, head_);
    visit.bias[r] = bias_.values(group.bias, head_) + offset;
    visit.grad_bias[r] = gradient ? gradient + offset : nullptr;
  }

  // Calls function(arguments of gather or scatter) for adjacent rows with the same lanes, and weights at equal distances.
  template <class Float, class Function>
  void for_each_window(const Visit& visit, const Weights& s, const QueryRows& rows, const Function& function) {
    for (int r = 0, end; r < visit.rows; r = end) {
      const int row = visit.first_row + r;
      const int64_t stride = r + 1 < visit.rows ? s.at(visit, r + 1) - s.at(visit, r) : 0;
      for (end = r + 1; end < visit.rows && s.at(visit, end) - s.at(visit, end - 1) == stride; ++end)
        if (block_.first[row + end - r] != block_.first[row] || block_.end[row + end - r] != block_.end[row]) break;
      const Lanes lanes = {block_.first[row], block_.end[row], block_.step};
      function(WindowArguments<Float>{lanes, end - r, s.at(visit, r), stride, rows.lane(row, 0), rows.stride, rows.padded,
                                      &prefetcher_});
    }
  }
};

}  // namespace natten
