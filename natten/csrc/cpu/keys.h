// The keys and values of a strip of a submap, and their gradients, as rows of float32.
//
// A ring stores the lines that this band of blocks or a later one sees (with three axes: whole planes), of which it stores
// the tokens of the strip. Each is converted, transposed and, for gradients, written back once.
#pragma once

#include <algorithm>

#include "block.h"

namespace natten {

class KeyLines {
 public:
  // lines: number of lines in the ring; tokens: largest number of tokens of a line.
  KeyLines(const Call& call, const Needs& needs, Scratch& scratch, int lines, int tokens)
      : needs_(needs), functions_(row_functions(call.plan->dtype)), lines_(lines), places_(tokens + 1),
        stride_(uncrowded((tokens + W + 15) / 16) * 16) {
    for (int side : {KEYS, VALUES}) {
      dim_[side] = static_cast<int>(side == KEYS ? call.plan->dim : call.plan->value_dim);
      padded_[side] = round_up(dim_[side], W);
      const size_t rows = size_t(lines) * places_ * padded_[side];
      const size_t some = size_t(W) * padded_[side];  // transpose reads W tokens, also where fewer are left
      if (needs.is_loaded(side)) natural_[side] = scratch.take_zeros(needs.gather[side] ? rows + some : some);
      if (needs.dot[side]) transposed_[side] = scratch.take(size_t(lines) * padded_[side] * stride_);
      if (needs.grad[side]) gradient_[side] = scratch.take(rows);
    }
    ones_ = scratch.take(places_);
    std::fill_n(ones_, places_, 1.f);
  }

  // Begins a head of a submap.
  void begin(const Submap& submap, int64_t head) {
    for (int side : {KEYS, VALUES}) {
      if (needs_.is_loaded(side)) view_[side] = submap.view(SIDE_TENSOR[side], head, functions_.size);
      if (needs_.grad[side]) gradient_view_[side] = submap.view(SIDE_GRADIENT[side], head, functions_.size);
    }
  }

  int lines() const { return lines_; }
  int padded(int side) const { return padded_[side]; }
  int64_t stride() const { return stride_; }

  // The token at a place of a line: as a row of d, transposed (rows are `stride` floats apart), and its gradient.
  const float* natural(int side, int line, int place) const { return natural_[side] + row(side, line, place); }
  float* gradient(int side, int line, int place) const { return gradient_[side] + row(side, line, place); }
  const float* transposed(int side, int line, int place) const {
    return transposed_[side] + int64_t(line) * padded_[side] * stride_ + place;
  }

  // Loads `count` tokens, which are adjacent in memory from `token` on, to places `place` .. of a line.
  void load(int side, int line, int place, const Token& token, int count) {
    if (needs_.grad[side]) std::memset(gradient(side, line, place), 0, sizeof(float) * count * padded_[side]);
    if (needs_.is_loaded(side))
      functions_.load(view_[side].at(token), view_[side].step[2], count, dim_[side], padded_[side], 1.f,
                      loaded(side, line, place));
  }

  // Transposes W tokens from `place` on, a multiple of W. Must follow their loading, before others are loaded.
  void transpose(int line, int place) {
    for (int side : {KEYS, VALUES}) {
      if (!needs_.dot[side]) continue;
      float* columns = transposed_[side] + int64_t(line) * padded_[side] * stride_ + place;
      for (int d = 0; d < padded_[side]; d += W)
        natten::transpose(loaded(side, line, place) + d, padded_[side], columns + d * stride_, stride_);
    }
  }

  // Adds gradients to those in memory, or overwrites them.
  void store(int side, int line, int place, const Token& token, int count, bool is_sum) const {
    if (count <= 0) return;
    const View& view = gradient_view_[side];
    const auto write = is_sum ? functions_.add : functions_.store;
    write(gradient(side, line, place), padded_[side], count, dim_[side], ones_, view.at(token), view.step[2]);
  }

 private:
  const Needs needs_;
  const RowFunctions functions_;
  const int lines_, places_;
  const int64_t stride_;
  int dim_[2], padded_[2];
  float *natural_[2] = {}, *transposed_[2] = {}, *gradient_[2] = {}, *ones_;
  View view_[2], gradient_view_[2];

  // Where a token is loaded to. Rows that are only transposed are not kept.
  float* loaded(int side, int line, int place) {
    return natural_[side] + (needs_.gather[side] ? row(side, line, place) : int64_t(place % W) * padded_[side]);
  }

  int64_t row(int side, int line, int place) const { return (int64_t(line) * places_ + place) * padded_[side]; }
};

}  // namespace natten
