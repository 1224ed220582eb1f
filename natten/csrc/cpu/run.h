// Cuts a call into tasks, deals them to the threads, and gives each the Map that suits it.
#pragma once

#include <memory>
#include <new>
#include <vector>

#include "dense.h"
#include "lines.h"
#include "parallel.h"

namespace natten {

constexpr int CHUNKS_PER_THREAD = 8;
constexpr int LONGEST_STRIP = 1024;  // tokens of a problem of one axis, so that what a thread holds stays small

// Pieces of the leading axis, worked on apart. With gradients, strips 0, 2, 4.. come before 1, 3, 5..: neighbours share
// keys, others must not.
inline int count_strips(const Call& call, bool has_gradients) {
  const Plan& plan = *call.plan;
  const int leading = plan.axis[0].length > 1 ? 0 : plan.axis[1].length > 1 ? 1 : 2;
  int64_t tasks = plan.batch * plan.heads;
  for (const Axis& axis : plan.axis) tasks *= axis.dilation;
  const Axis& axis = plan.axis[leading];
  const int64_t n = axis.length / axis.dilation;  // of the shortest residue class
  const int64_t shortest = (has_gradients ? 3 : 1) * axis.kernel_size + axis.stride;
  int64_t strips = (4 * call.threads + tasks - 1) / tasks;
  if (call.threads == 1 || tasks % call.threads == 0) strips = 1;
  if (leading == 2) strips = std::max(strips, (n + LONGEST_STRIP - 1) / LONGEST_STRIP);
  return static_cast<int>(std::max<int64_t>(1, std::min(strips, n / shortest)));
}

// Strips add to what is there.
inline void clear(const Call& call, TensorName name) {
  const Plan& plan = *call.plan;
  const Strides& strides = plan.strides[name];
  const int size = row_functions(plan.dtype).size;
  parallel_for(plan.batch * plan.axis[0].length, call.threads, [&](int64_t i) {
    char* base = static_cast<char*>(call.tensors[name]) +
                 (i / plan.axis[0].length * strides.batch + i % plan.axis[0].length * strides.axis[0]) * size;
    for (int64_t y = 0; y < plan.axis[1].length; ++y)
      for (int64_t x = 0; x < plan.axis[2].length; ++x)
        for (int64_t h = 0; h < plan.heads; ++h)
          std::memset(base + (y * strides.axis[1] + x * strides.axis[2] + h * strides.head) * size, 0, plan.dim * size);
  });
}

// Operator: a class template over the Map, made with (call, map, scratch), and called with (block) for each block.
template <template <class> class Operator>
class Runner {
 public:
  explicit Runner(const Call& call) : call_(call), plan_(*call.plan) {
    needs_ = Operator<LineMap>::needs();
    const bool has_gradients = needs_.grad[KEYS] || needs_.grad[VALUES];
    strips_ = count_strips(call, has_gradients);
    phases_ = has_gradients && strips_ > 1 ? 2 : 1;
    residues_ = 1;
    for (const Axis& axis : plan_.axis) residues_ *= axis.dilation;
  }

  void run() {
    for (int side : {KEYS, VALUES})
      if (needs_.grad[side] && strips_ > 1) clear(call_, SIDE_GRADIENT[side]);
    const int64_t table = table_size(plan_);
    if (call_.grad_rpb) std::memset(call_.grad_rpb, 0, sizeof(float) * plan_.heads * table);
    if (!plan_.batch || !plan_.heads) return;
    const int64_t most = (strips_ + phases_ - 1) / phases_ * plan_.heads * plan_.batch * residues_;
    const int64_t chunks = std::min<int64_t>(most, int64_t(CHUNKS_PER_THREAD) * call_.threads);
    // Each chunk has its own bias gradient, summed in order afterwards: the same sum whichever thread took it.
    const int64_t heads_per_chunk = (plan_.heads + chunks - 1) / chunks + 1;
    std::vector<float> gradients(call_.grad_rpb ? phases_ * chunks * heads_per_chunk * table : 0);
    for (int phase = 0; phase < phases_; ++phase)
      parallel_for(chunks, call_.threads, [&](int64_t chunk) {
        float* gradient = gradients.empty() ? nullptr : &gradients[(phase * chunks + chunk) * heads_per_chunk * table];
        run_chunk(phase, chunk, chunks, gradient);
      });
    if (!call_.grad_rpb) return;
    for (int phase = 0; phase < phases_; ++phase)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const float* from = &gradients[(phase * chunks + chunk) * heads_per_chunk * table];
        const int64_t first = begin(phase, chunk, chunks) / tasks_per_head(phase);
        const int64_t count = std::min(heads_per_chunk, plan_.heads - first) * table;
        for (int64_t i = 0; i < count; ++i) call_.grad_rpb[first * table + i] += from[i];
      }
  }

 private:
  const Call& call_;
  const Plan& plan_;
  Needs needs_;
  int strips_, phases_;
  int64_t residues_;

  // Tasks are ordered by head, image, residue class, strip.
  int strips_in(int phase) const { return (strips_ - phase + phases_ - 1) / phases_; }
  int64_t tasks_per_head(int phase) const { return plan_.batch * residues_ * strips_in(phase); }
  int64_t begin(int phase, int64_t chunk, int64_t chunks) const {
    return plan_.heads * tasks_per_head(phase) * chunk / chunks;
  }

  template <class Map>
  struct Worker {
    Bias bias;
    Map map;
    Operator<Map> op;

    template <class... Rest>
    Worker(const Call& call, const Needs& needs, float* gradient, int64_t first_head, Scratch& scratch, Rest... rest)
        : bias(call, gradient, first_head), map(call, needs, bias, scratch, rest...), op(call, map, scratch) {}

    void run(const Submap& submap, const Submap* next, int strip) {
      op.start(submap);
      map.for_each_block(submap, next, strip, [&](const Block& block) { op(block); });
    }
  };

  void run_chunk(int phase, int64_t chunk, int64_t chunks, float* gradient) const {
    const int64_t per_head = tasks_per_head(phase), strips = strips_in(phase);
    const int64_t first = begin(phase, chunk, chunks), end = begin(phase, chunk + 1, chunks);
    Scratch& scratch = thread_scratch();
    std::unique_ptr<Worker<LineMap>> lines;
    std::unique_ptr<Worker<DenseMap>> dense;
    const auto submap_of = [&](int64_t task) {
      const int64_t rest = task % per_head / strips;
      return Submap(call_, task / per_head, rest / residues_, rest % residues_);
    };
    for (int64_t task = first; task < end; ++task) {
      const int strip = static_cast<int>(task % per_head % strips) * phases_ + phase;
      const Submap submap = submap_of(task), following = submap_of(std::min(task + 1, end - 1));
      const Submap* next = strips_ == 1 && task + 1 < end ? &following : nullptr;
      if (DenseMap::fits(plan_, submap.n) && strips_ == 1) {
        if (!dense) dense = std::make_unique<Worker<DenseMap>>(call_, needs_, gradient, first / per_head, scratch);
        dense->run(submap, next, strip);
      } else {
        if (!lines) lines = std::make_unique<Worker<LineMap>>(call_, needs_, gradient, first / per_head, scratch, strips_);
        lines->run(submap, next, strip);
      }
    }
  }
};

// Runs a whole call. 0, or 1 if memory ran out.
template <template <class> class Operator>
int run(const Call& call) {
  try {
    Runner<Operator>(call).run();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace natten
