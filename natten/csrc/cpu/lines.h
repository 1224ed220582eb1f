// The general Map. Rows are adjacent queries on the last axis, in adjacent lines of the axis before it.
//
// A ring buffer stores the lines of keys that this band of blocks or a later one sees (with three axes: whole planes). Each
// line is converted, transposed and, for gradients, written back once. Of long lines, it stores a strip. If there is only
// one line, neighbors on the line act as rows in gather and scatter.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "bias.h"
#include "block.h"

namespace natten {

// Adjacent queries on a line, and the first keys of their windows.
struct Group {
  int first, lanes, kind;
  KeyAccess access;
  IntVec index;                 // first key of each lane, relative to that of lane 0; for PERMUTED
  int place[W], lane_keys[W];   // first key of each lane, relative to the first stored key; number of keys
};

// The first key of each window relative to its query (if there is a table), and the number of keys. Groups with the same
// pattern have the same bias.
using Pattern = std::array<int, 2 * W>;

// The groups of a line, or of a strip of it, and their bias. The maps of several heads share them.
struct Groups : Bias {
  using Bias::Bias;
  std::vector<Group> all;
  std::vector<Pattern> patterns;     // by kind
  int n = -1, begin = -1, end = -1;  // tokens of the line, queries of the strip
};

class LineMap {
 public:
  using Shared = Groups;
  static constexpr int BAND_PAD = MAX_ROWS - 1;

  LineMap(const Call& call, const Needs& needs, Groups& groups, Scratch& scratch, Strips strips)
      : plan_(*call.plan), needs_(needs), groups_(groups), functions_(row_functions(plan_.dtype)), strips_(strips),
        dim_(plan_.dim), padded_(round_up(dim_, W)) {
    for (int i = 0; i < 3; ++i) kernel_[i] = plan_.axis[i].kernel_size;
    const int longest = (plan_.axis[2].length + plan_.axis[2].dilation - 1) / plan_.axis[2].dilation;
    is_one_line_ = plan_.axis[0].length == 1 && plan_.axis[1].length == 1;
    const int strip = strips.axis == 2 ? (longest + strips.count - 1) / strips.count + 2 * kernel_[2] + 1 : longest;
    tokens_ = std::min(strip, longest);
    // Elements beyond the last token remain 0.
    places_ = std::max(round_up(tokens_, W), tokens_ + kernel_[2]);
    place_stride_ = uncrowded((tokens_ + W + 7) / 8) * 8;
    lines_ = ring_lines();
    for (int side : {KEYS, VALUES}) {
      const size_t rows = size_t(lines_) * places_ * padded_;
      natural_[side] = nullptr;
      if (needs.gather[side]) natural_[side] = scratch.take_zeros(rows);
      else if (needs.dot[side]) natural_[side] = scratch.take_zeros(size_t(places_) * padded_);  // one line at a time
      if (needs.dot[side]) transposed_[side] = scratch.take_zeros(size_t(lines_) * padded_ * place_stride_);
      if (needs.grad[side]) gradient_[side] = scratch.take(rows);
    }
    zeros_ = scratch.take_zeros(size_t(kernel_[2]) * W);
    ones_ = scratch.take(tokens_);
    std::fill_n(ones_, tokens_, 1.f);
  }

  // A line of keys, and the rows of the block whose windows contain it.
  struct Visit {
    int z, y;  // of the keys
    int first_row, rows, keys;
  };

  // Number of floats in the weights of a visit. They must be initialized with zeros.
  int64_t weights_size() const {
    return is_one_line_ ? int64_t(kernel_[2] + 2 * BAND_PAD) * W : int64_t(MAX_ROWS) * uncrowded(kernel_[2]) * W;
  }

  // The weights of a visit, [rows][keys][W], in memory of this size.
  Rows weights(float* memory) const {
    return {memory + (is_one_line_ ? BAND_PAD * W : 0), int64_t(uncrowded(kernel_[2])) * W};
  }

  // Begins strip `strip` of a submap, whose head is the head-th of the bias. Even strips come first.
  void begin(const Submap& submap, int strip, int head) {
    submap_ = submap, head_ = head;
    for (int side : {KEYS, VALUES}) {
      if (needs_.is_loaded(side)) view_[side] = submap.view(SIDE_TENSOR[side], functions_.size);
      if (needs_.grad[side]) gradient_view_[side] = submap.view(SIDE_GRADIENT[side], functions_.size);
    }
    choose_range(strip);
  }

  // Number of bands of blocks, which must be processed in order.
  int bands() const { return (end_[0] - begin_[0]) * bands_per_plane(); }

  // Calls function(block) for each block of a band.
  template <class Function>
  void for_each_block(int band, const Function& function) {
    const Band b = band_of(band);
    set_lines(b);
    hold(first_kept_line(b), end_of_lines(b));
    for (const Group& group : groups_.all) {
      set_group(group);
      function(block_);
    }
  }

  // Must be called after the last band.
  void end() { hold(packed_end_, packed_end_); }

  // Calls function(visit) for each line of keys that the block sees.
  template <class Function>
  NATTEN_INLINE void for_each_visit(const Function& function) const {
    const int z = block_.token[0][0].z, y = block_.token[0][0].y;
    const int *first = &windows_[1].first[y], *end = &windows_[1].end[y], last = block_.rows - 1;
    for (int kz = windows_[0].first[z]; kz < windows_[0].end[z]; ++kz)
      for (int ky = first[0], from = 0, to = 0; ky < end[last]; ++ky) {
        while (end[from] <= ky) ++from;
        while (to <= last && first[to] <= ky) ++to;
        if (from < to) function(Visit{kz, ky, from, to - from, kernel_[2]});
      }
  }

  // s = query . key, plus the bias if is_biased
  void dot(const Visit& visit, const BlockRows& query, Side side, bool is_biased, Rows s) {
    const int64_t step = groups_.has_table() ? -int64_t(kernel_[2]) * W : 0;  // from one row's bias to the next's
    const float* keys = transposed_[side] + int64_t(slot(visit)) * padded_ * place_stride_ + group_->place[0];
    const ConstRows bias = is_biased ? ConstRows{groups_.value(head_, group_->kind) + bias_offset(visit), step}
                                     : ConstRows{zeros_, 0};
    const DotArguments a{dim_, query.transposed_rows(visit.first_row), {keys, place_stride_}, group_->index, bias, s};
    if (group_->access == SHIFTED) dot_rows<SHIFTED>(a, visit.rows, kernel_[2]);
    else dot_rows<PERMUTED>(a, visit.rows, kernel_[2]);
  }

  // out += s . value
  void gather(const Visit& visit, Rows s, Side side, const BlockRows& out) {
    const float* values = natural_[side] + int64_t(slot(visit)) * places_ * padded_;
    for_each_piece(padded_, [&](int d, auto vectors) {
      if (is_one_line_) {
        for_each_band([&](int lane, int size, int keys, int64_t step) {
          with_constant<MAX_ROWS>(size, [&](auto n) {
            natten::gather<n, vectors>(keys, {s.first + lane, step}, {values + group_->place[lane] * padded_ + d, padded_},
                                       {out.lane_of_rows(0, lane)[0] + d, padded_});
          });
        });
        return;
      }
      const Lanes lanes = lanes_of(s, out.lane_of_rows(visit.first_row, 0), d);
      with_constant<MAX_ROWS>(visit.rows, [&](auto n) { gather_lanes<n, vectors>(lanes, values + d); });
    });
  }

  // gradient of the keys or values += s . query
  void scatter(const Visit& visit, Rows s, const BlockRows& query, Side side) {
    float* gradients = gradient_[side] + int64_t(slot(visit)) * places_ * padded_;
    for_each_piece(padded_, [&](int d, auto vectors) {
      if (is_one_line_) {
        for_each_band([&](int lane, int size, int keys, int64_t step) {
          for_each_part(keys, SCATTER_KEYS, [&](int first, int count) {
            with_constant<SCATTER_KEYS>(count, [&](auto n) {
              natten::scatter<n, vectors>(size, {s.first + lane + first * W, step},
                                          {query.lane_of_rows(0, lane)[0] + d, padded_},
                                          {gradients + (group_->place[lane] + first) * padded_ + d, padded_});
            });
          });
        });
        return;
      }
      const Lanes lanes = lanes_of(s, query.lane_of_rows(visit.first_row, 0), d);
      for_each_part(kernel_[2], SCATTER_KEYS, [&](int first, int count) {
        with_constant<SCATTER_KEYS>(count, [&](auto n) {
          scatter_lanes<n, vectors>(lanes, first, visit.rows, gradients + d);
        });
      });
    });
  }

  // gradient of the bias += s
  void add_bias_gradient(const Visit& visit, Rows s) {
    float* to = groups_.gradient(head_, group_->kind) + bias_offset(visit);
    for (int r = 0; r < visit.rows; ++r, to -= kernel_[2] * W)
      for (int j = 0; j < kernel_[2] * W; j += W) store(to + j, load(to + j) + load(s[r] + j));
  }

  // Returns the first slot of the keys of a visit in the window of a query, and sets their number.
  int first_slot(const Visit& visit, int r, int lane, int* count) const {
    const Token& t = block_.token[r][lane];
    const int a = visit.z - windows_[0].first[t.z] + windows_[0].missing[t.z];
    const int b = visit.y - windows_[1].first[t.y] + windows_[1].missing[t.y];
    *count = group_->lane_keys[lane];
    return (a * kernel_[1] + b) * kernel_[2] + windows_[2].missing[t.x];
  }

 private:
  const Plan& plan_;
  const Needs needs_;
  Groups& groups_;
  const RowFunctions functions_;
  const Strips strips_;
  const int dim_, padded_;
  int kernel_[3];
  bool is_one_line_;
  int tokens_, places_, place_stride_, lines_;  // sizes of a line; number of lines in the ring
  float *natural_[2] = {}, *transposed_[2] = {}, *gradient_[2] = {}, *zeros_, *ones_;

  Submap submap_;
  int head_ = 0;
  View view_[2], gradient_view_[2];
  Windows windows_[3];
  int begin_[3] = {}, end_[3] = {};  // queries of the strip
  int origin_ = 0, key_end_ = 0;     // stored keys of a line
  int kept_begin_ = 0, packed_end_ = 0;  // stored lines
  int own_begin_ = 0, own_end_ = 0;      // keys along the axis of strips whose gradient this strip is the first to write

  Block block_;
  const Group* group_ = nullptr;

  int line(int z, int y) const { return z * submap_.n[1] + y; }

  // --- storage of a strip --------------------------------------------------------------------------------------------

  int ring_lines() const {
    int n[2];
    for (int i : {0, 1}) n[i] = (plan_.axis[i].length + plan_.axis[i].dilation - 1) / plan_.axis[i].dilation;
    if (plan_.axis[0].length > 1) return std::min(n[0], kernel_[0]) * n[1];
    return std::min<int>(n[1], kernel_[1] + MAX_ROWS + plan_.axis[1].stride);
  }

  // Adjacent lines of queries.
  struct Band {
    int z, y, rows;
  };

  int bands_per_plane() const { return (end_[1] - begin_[1] + MAX_ROWS - 1) / MAX_ROWS; }

  // Bands of a plane have nearly equal heights.
  Band band_of(int band) const {
    const int count = bands_per_plane(), i = band % count, lines = end_[1] - begin_[1];
    const int first = lines * i / count, end = lines * (i + 1) / count;
    return {begin_[0] + band / count, begin_[1] + first, end - first};
  }

  // One past the last line that a band needs.
  int end_of_lines(const Band& b) const {
    return line(windows_[0].end[b.z] - 1, windows_[1].end[b.y + b.rows - 1] - 1) + 1;
  }

  // The first line that this band or a later one needs.
  int first_kept_line(const Band& b) const {
    const bool has_planes = plan_.axis[0].length > 1;
    return has_planes ? line(windows_[0].first[b.z], 0) : line(0, windows_[1].first[b.y]);
  }

  void choose_range(int strip) {
    const Submap& submap = submap_;
    for (int i = 0; i < 3; ++i) {
      windows_[i].make(plan_.axis[i], submap.n[i]);
      begin_[i] = 0, end_[i] = submap.n[i];
    }
    const int axis = strips_.axis, n = submap.n[axis];
    begin_[axis] = int64_t(n) * strip / strips_.count;
    end_[axis] = int64_t(n) * (strip + 1) / strips_.count;
    origin_ = 0, key_end_ = submap.n[2];
    if (axis == 2 && strips_.count > 1) {
      origin_ = windows_[2].first[begin_[2]];
      key_end_ = windows_[2].end[end_[2] - 1];
    }
    own_begin_ = 0, own_end_ = windows_[axis].n;
    if (strip % 2) {
      own_begin_ = windows_[axis].end[begin_[axis] - 1];
      if (strip + 1 < strips_.count) own_end_ = windows_[axis].first[end_[axis]];
    }
    kept_begin_ = packed_end_ = first_kept_line(band_of(0));
    make_groups();
  }

  // Writes back the gradients of lines before `first`, and loads the lines before `end`.
  void hold(int first, int end) {
    for (; kept_begin_ < first; ++kept_begin_)
      for (int side : {KEYS, VALUES})
        if (needs_.grad[side]) write_gradient(side, kept_begin_);
    for (; packed_end_ < end; ++packed_end_)
      for (int side : {KEYS, VALUES})
        if (needs_.is_loaded(side) || needs_.grad[side]) pack(side, packed_end_);
  }

  void pack(int side, int which) {
    const int ring = which % lines_, count = key_end_ - origin_;
    if (needs_.grad[side])
      std::memset(gradient_[side] + int64_t(ring) * places_ * padded_, 0, sizeof(float) * places_ * padded_);
    if (!needs_.is_loaded(side)) return;
    float* rows = natural_[side] + (needs_.gather[side] ? int64_t(ring) * places_ * padded_ : 0);
    functions_.load(view_[side].at(first_token(which)), view_[side].step[2], count, dim_, padded_, 1.f, rows);
    if (count < tokens_)  // a longer line may have been stored here before
      std::memset(rows + int64_t(count) * padded_, 0, sizeof(float) * (places_ - count) * padded_);
    if (!needs_.dot[side]) return;
    float* columns = transposed_[side] + int64_t(ring) * padded_ * place_stride_;
    for (int i = 0; i < count; i += W)
      for (int d = 0; d < padded_; d += W)
        transpose(rows + int64_t(i) * padded_ + d, padded_, columns + int64_t(d) * place_stride_ + i, place_stride_);
  }

  // Odd strips come later, and add to the gradients that their neighbors have written.
  void write_gradient(int side, int which) {
    const Token line = first_token(which);
    const int at[2] = {line.z, line.y};
    const bool is_own = strips_.axis == 2 || (at[strips_.axis] >= own_begin_ && at[strips_.axis] < own_end_);
    const int begin = strips_.axis == 2 ? std::max(own_begin_, origin_) : is_own ? origin_ : key_end_;
    const int end = strips_.axis == 2 ? std::min(own_end_, key_end_) : key_end_;
    write_gradient(functions_.add, side, line, origin_, begin);
    write_gradient(functions_.store, side, line, begin, end);
    write_gradient(functions_.add, side, line, end, key_end_);
  }

  void write_gradient(decltype(RowFunctions::store) write, int side, const Token& line, int begin, int end) {
    const View& view = gradient_view_[side];
    const float* rows = gradient_[side] + int64_t((line.z * submap_.n[1] + line.y) % lines_) * places_ * padded_;
    if (begin < end)
      write(rows + int64_t(begin - origin_) * padded_, padded_, end - begin, dim_, ones_, view.at({line.z, line.y, begin}),
            view.step[2]);
  }

  Token first_token(int which) const { return {which / submap_.n[1], which % submap_.n[1], origin_}; }

  // --- groups of queries ---------------------------------------------------------------------------------------------

  void make_groups() {
    if (groups_.n == submap_.n[2] && groups_.begin == begin_[2] && groups_.end == end_[2]) return;
    groups_.n = submap_.n[2], groups_.begin = begin_[2], groups_.end = end_[2];
    groups_.all.clear();
    const Windows& windows = windows_[2];
    for (int x = begin_[2]; x < end_[2];) {
      Group group = {};
      group.first = x, group.access = SHIFTED;
      const int first_key = windows.first[x];
      for (; group.lanes < W && x < end_[2] && windows.first[x] - first_key < W; ++group.lanes, ++x) {
        const int lane = group.lanes;
        group.index[lane] = windows.first[x] - first_key;
        group.place[lane] = windows.first[x] - origin_;
        group.lane_keys[lane] = windows.end[x] - windows.first[x];
        if (group.index[lane] != lane) group.access = PERMUTED;
      }
      group.kind = kind_of(pattern_of(group));
      groups_.all.push_back(group);
    }
  }

  // Lanes without a query repeat the first.
  Pattern pattern_of(const Group& group) const {
    Pattern pattern;
    for (int lane = 0; lane < W; ++lane) {
      const int real = lane < group.lanes ? lane : 0;
      pattern[lane] = groups_.has_table() ? origin_ + group.place[real] - (group.first + real) : 0;
      pattern[W + lane] = group.lane_keys[real];
    }
    return pattern;
  }

  int kind_of(const Pattern& pattern) {
    std::vector<Pattern>& known = groups_.patterns;
    const auto found = std::find(known.begin(), known.end(), pattern);
    if (found != known.end()) return static_cast<int>(found - known.begin());
    known.push_back(pattern);
    return groups_.add_kind(bias_entries(pattern));
  }

  // Entries of the bias table for the keys of a group, line by line of the table.
  std::vector<int> bias_entries(const Pattern& pattern) const {
    const int lines = groups_.has_table() ? (2 * kernel_[0] - 1) * (2 * kernel_[1] - 1) : 1;
    const int width = 2 * kernel_[2] - 1;
    std::vector<int> entry(size_t(lines) * kernel_[2] * W);
    for (int t = 0; t < lines; ++t)
      for (int j = 0; j < kernel_[2]; ++j)
        for (int lane = 0; lane < W; ++lane) {
          const int which = groups_.has_table() ? t * width + pattern[lane] + j + kernel_[2] - 1 : 0;
          entry[(size_t(t) * kernel_[2] + j) * W + lane] = j < pattern[W + lane] ? which : -1;
        }
    return entry;
  }

  void set_lines(const Band& b) {
    block_.rows = b.rows;
    for (int r = 0; r < b.rows; ++r)
      for (int lane = 0; lane < W; ++lane) block_.token[r][lane] = {b.z, b.y + r, 0};
  }

  void set_group(const Group& group) {
    group_ = &group;
    for (int r = 0; r < block_.rows; ++r) {
      block_.lanes[r] = group.lanes;
      for (int lane = 0; lane < group.lanes; ++lane) block_.token[r][lane].x = group.first + lane;
    }
  }

  // --- products ------------------------------------------------------------------------------------------------------

  int slot(const Visit& visit) const { return line(visit.z, visit.y) % lines_; }

  // The offset of the bias of a visit's first row. The bias of the next row is one line earlier.
  int64_t bias_offset(const Visit& visit) const {
    if (!groups_.has_table()) return 0;
    const Token& t = block_.token[visit.first_row][0];
    const int dz = visit.z - t.z + kernel_[0] - 1, dy = visit.y - t.y + kernel_[1] - 1;
    return int64_t(dz * (2 * kernel_[1] - 1) + dy) * kernel_[2] * W;
  }

  // On a single line, neighbors act as rows. Calls function(lane, size, keys, step) for bands of up to MAX_ROWS lanes, which
  // together see `keys` keys. The weights of the next neighbor are `step` floats further, and 0 for keys that it does not
  // see.
  template <class Function>
  NATTEN_INLINE void for_each_band(const Function& function) const {
    const int* key = group_->place;
    for (int lane = 0, end; lane < group_->lanes; lane = end) {
      end = lane + 1;
      const int move = end < group_->lanes ? key[end] - key[lane] : 0;
      while (end < group_->lanes && end - lane < MAX_ROWS && key[end] - key[end - 1] == move &&
             key[end] - key[lane] <= BAND_PAD)
        ++end;
      // The band's j-th key is key j - i * move of lane + i, with the weight at s + lane + i + (j - i * move) * W.
      function(lane, end - lane, key[end - 1] - key[lane] + group_->lane_keys[end - 1], int64_t(1 - move * W));
    }
  }

  // The data of the loops over the lanes of a group, in one structure, so that the compiler keeps it in registers.
  struct Lanes {
    int count;
    const int *key, *keys;  // first key of each, minus origin_; number of keys
    ConstRows weights;
    Rows rows;  // queries or sums
    int64_t padded;
  };

  Lanes lanes_of(Rows weights, Rows rows, int d) const {
    return {group_->lanes, group_->place, group_->lane_keys, {weights.first, weights.stride}, {rows.first + d, rows.stride},
            padded_};
  }

  template <int ROWS, int VECS>
  static void gather_lanes(const Lanes lanes, const float* values) {
    for (int lane = 0; lane < lanes.count; ++lane)
      natten::gather<ROWS, VECS>(lanes.keys[lane], {lanes.weights.first + lane, lanes.weights.stride},
                                 {values + lanes.key[lane] * lanes.padded, lanes.padded},
                                 {lanes.rows.first + lane * lanes.padded, lanes.rows.stride});
  }

  template <int KEYS, int VECS>
  static void scatter_lanes(const Lanes lanes, int first, int rows, float* gradients) {
    for (int lane = 0; lane < lanes.count; ++lane)
      natten::scatter<KEYS, VECS>(rows, {lanes.weights.first + lane + first * W, lanes.weights.stride},
                                  {lanes.rows.first + lane * lanes.padded, lanes.rows.stride},
                                  {gradients + (lanes.key[lane] + first) * lanes.padded, lanes.padded});
  }
};

}  // namespace natten
