// Blocks, and the interface of a Map. A block is up to MAX_ROWS rows of W queries, which share most of their keys.
//
// A Map (lines.h, dense.h) divides a submap into bands of blocks, stores the keys and values of a block, and applies the
// three products of micro.h, one line of keys at a time, so that the weights stay in the L1 cache. The operators
// (attention.cpp, unfused.cpp) are templates over the Map.
//
// run.h calls begin(submap, strip, head), then for_each_block(band, function) for all bands in order, then end(), which
// writes the last gradients. In function(block), for_each_visit visits the lines of keys that the block sees; dot, gather,
// scatter and add_bias_gradient take it as argument.
#pragma once

#include <algorithm>
#include <cstring>

#include "micro.h"
#include "scratch.h"
#include "submap.h"

namespace natten {

enum Side { KEYS, VALUES };

// Which products with keys and values an operator uses.
struct Needs {
  bool dot[2], gather[2], grad[2];

  bool is_loaded(int side) const { return dot[side] || gather[side]; }
};

constexpr TensorName SIDE_TENSOR[2] = {KEY, VALUE}, SIDE_GRADIENT[2] = {GRAD_KEY, GRAD_VALUE};

// Submaps are cut into `count` strips along `axis`.
struct Strips {
  int axis, count;
};

struct Block {
  int rows;
  int lanes[MAX_ROWS];        // queries of each row
  Token token[MAX_ROWS][W];   // position of each query

  // Calls function(r, lane, count) for each run of adjacent queries on the map.
  template <class Function>
  NATTEN_INLINE void for_each_run(const Function& function) const {
    for (int r = 0; r < rows; ++r)
      for (int lane = 0, end; lane < lanes[r]; lane = end) {
        const Token& first = token[r][lane];
        for (end = lane + 1; end < lanes[r] && token[r][end].y == first.y && token[r][end].z == first.z;) ++end;
        function(r, lane, end - lane);
      }
  }
};

// Queries, or gradients of outputs, of a block: as rows of d, [MAX_ROWS][W][padded], and transposed, [MAX_ROWS][padded][W].
// `stride` is the distance between the MAX_ROWS.
struct BlockRows {
  float *natural, *transposed;
  int dim, padded, stride;

  BlockRows(Scratch& scratch, int dim_, bool has_transposed = true) : dim(dim_), padded(round_up(dim_, W)) {
    stride = uncrowded(padded) * W;
    natural = scratch.take(MAX_ROWS * stride);
    transposed = has_transposed ? scratch.take(MAX_ROWS * stride) : nullptr;
  }

  // One lane of the rows from `r` on.
  Rows lane_of_rows(int r, int lane) const { return {natural + r * stride + lane * padded, stride}; }
  ConstRows transposed_rows(int r) const { return {transposed + r * stride, stride}; }

  // Lanes without a query are set to 0.
  void load(const Block& block, const View& from, const RowFunctions& functions, float scale) {
    block.for_each_run([&](int r, int lane, int count) {
      functions.load(from.at(block.token[r][lane]), from.step[2], count, dim, padded, scale, lane_of_rows(r, lane)[0]);
    });
    for (int r = 0; r < block.rows; ++r) {
      if (block.lanes[r] < W)
        std::memset(lane_of_rows(r, block.lanes[r])[0], 0, sizeof(float) * (W - block.lanes[r]) * padded);
      if (transposed)
        for (int d = 0; d < padded; d += W)
          transpose(lane_of_rows(r, 0)[0] + d, padded, transposed + r * stride + d * W, W);
    }
  }

  void zero(const Block& block) { std::memset(natural, 0, sizeof(float) * block.rows * stride); }

  void store(const Block& block, const View& to, const RowFunctions& functions, const float (*scale)[W]) const {
    block.for_each_run([&](int r, int lane, int count) {
      functions.store(lane_of_rows(r, lane)[0], padded, count, dim, &scale[r][lane], to.at(block.token[r][lane]),
                      to.step[2]);
    });
  }
};

}  // namespace natten
