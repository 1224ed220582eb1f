// Blocks of queries, the keys that they meet, and the rows of d of their queries.
#pragma once

#include <cstring>
#include <vector>

#include "products.h"
#include "scratch.h"
#include "submap.h"

namespace natten {

enum Side { KEYS, VALUES };

// What an operator does with keys and values.
struct Needs {
  bool dot[2], gather[2], grad[2];

  bool is_loaded(int side) const { return dot[side] || gather[side]; }
};

constexpr TensorName SIDE_TENSOR[2] = {KEY, VALUE}, SIDE_GRADIENT[2] = {GRAD_KEY, GRAD_VALUE};

// Adjacent queries of a row.
struct Run {
  int row, lane, count;
  Token first;
};

// Keys of a line that adjacent rows of a block see. In all of them, lane 0 begins with the same key.
struct Visit {
  int line, place;     // the line, by its place in the ring, and the first key of lane 0 in it
  int keys;            // of each lane
  int first_row, rows;
  int slot[MAX_ROWS];      // of the first key in the window, for each of the rows
  const float* bias[MAX_ROWS];  // of the first key, and its gradient, or null, for each of the rows
  float* grad_bias[MAX_ROWS];
};

// Up to MAX_ROWS rows of W queries, which share most of their keys. Lanes first .. end - 1 have a query of the block; the
// others have none, or one of another block.
struct Block {
  int rows;
  int first[MAX_ROWS], end[MAX_ROWS];  // lanes of each row that have a query
  int step[W];                         // see Lanes
  int missing[MAX_ROWS][W];            // slots of a causal window before the first key of each lane, on the last axis
  bool has_missing;                    // some window has slots without a key
  KeyAccess access;
  IntVec index;                        // `step` as a vector, for PERMUTED
  std::vector<Run> runs;
  std::vector<Visit> visits;
};

// Logits or weights of a block, [rows][slots][W]: of whole windows, or of one visit at a time.
struct Weights {
  float* first;
  int64_t stride;  // from one row to the next
  bool is_whole;

  Weights(Scratch& scratch, int slots, bool is_whole_)
      : stride(int64_t(uncrowded(round_up(slots, W))) * W), is_whole(is_whole_) {
    first = scratch.take_zeros(MAX_ROWS * stride);
  }

  float* row(int r) const { return first + r * stride; }

  // The keys of a visit, for the r-th of its rows.
  float* at(const Visit& visit, int r) const {
    return row(visit.first_row + r) + (is_whole ? int64_t(visit.slot[r]) * W : 0);
  }
};

// Queries, or outputs or gradients of queries, of a block: as rows of d, [MAX_ROWS][W][padded], and transposed,
// [padded][MAX_ROWS][W].
struct QueryRows {
  float *natural, *transposed;
  int dim, padded;
  int64_t stride;  // from one of the MAX_ROWS to the next

  QueryRows(Scratch& scratch, int dim_, bool has_transposed)
      : dim(dim_), padded(round_up(dim_, W)), stride(int64_t(W) * padded + 16) {
    natural = scratch.take(MAX_ROWS * stride);
    transposed = has_transposed ? scratch.take(int64_t(MAX_ROWS) * W * padded) : nullptr;
  }

  float* lane(int r, int lane) const { return natural + r * stride + lane * padded; }

  // Lanes without a query are set to 0. The transposed rows are multiplied by `factor`, too.
  void load(const Block& block, const View& from, const RowFunctions& functions, float scale, float factor = 1.f) {
    for (int r = 0; r < block.rows; ++r)
      if (block.end[r] < W) std::memset(lane(r, block.end[r]), 0, sizeof(float) * (W - block.end[r]) * padded);
    for (const Run& run : block.runs)
      functions.load(from.at(run.first), from.step[2], run.count, dim, padded, scale, lane(run.row, run.lane));
    if (!transposed) return;
    for (int r = 0; r < block.rows; ++r)
      for (int d = 0; d < padded; d += W)
        transpose(natural + r * stride + d, padded, transposed + (int64_t(d) * MAX_ROWS + r) * W, MAX_ROWS * W, factor);
  }

  void zero(const Block& block) { std::memset(natural, 0, sizeof(float) * block.rows * stride); }

  // Writes the lanes that have a query, multiplied by scale[row][lane].
  void store(const Block& block, const View& to, const RowFunctions& functions, const float (*scale)[W]) const {
    for (const Run& run : block.runs) {
      const int skipped = std::max(0, block.first[run.row] - run.lane), lane_ = run.lane + skipped;
      if (skipped >= run.count) continue;
      const Token token = {run.first.z, run.first.y, run.first.x + skipped};
      functions.store(lane(run.row, lane_), padded, run.count - skipped, dim, &scale[run.row][lane_], to.at(token),
                      to.step[2]);
    }
  }
};

// Calls function(address of a query, row, lane) for each query of a block that a tensor has one value of, like lse.
template <class Function>
NATTEN_INLINE void for_each_query(const Block& block, const View& view, const Function& function) {
  for (const Run& run : block.runs) {
    char* address = view.at(run.first);
    for (int i = 0; i < run.count; ++i, address += view.step[2])
      if (run.lane + i >= block.first[run.row]) function(address, run.row, run.lane + i);
  }
}

}  // namespace natten
