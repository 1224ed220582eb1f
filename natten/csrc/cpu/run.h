// Divides a call into tasks, distributes them over threads, and selects a Map for each.
#pragma once

#include <memory>
#include <new>
#include <vector>

#include "dense.h"
#include "lines.h"
#include "parallel.h"

namespace natten {

constexpr int CHUNKS_PER_THREAD = 2, TASKS_PER_THREAD = 4, FEW_TASKS = 8;
constexpr int64_t MAX_HEADS = 2;  // heads per task; more do not fit into the cache
// Largest number of queries in a strip of the last axis, so that the data of a thread fits into its cache.
constexpr int64_t LONGEST_LINE = 1024, LONGEST_OF_MANY_LINES = 112;

// Strips are pieces of a submap that are processed independently: pieces of the last axis if it is long, else of the first.
// Neighboring strips share keys. With gradients, strips 0, 2, 4.. are processed before 1, 3, 5.., which must not share any.
inline Strips choose_strips(const Call& call, bool has_gradients) {
  const Plan& plan = *call.plan;
  const auto tokens = [&](int i) { return plan.axis[i].length / plan.axis[i].dilation; };  // in the shortest class
  const int leading = plan.axis[0].length > 1 ? 0 : plan.axis[1].length > 1 ? 1 : 2;
  const int64_t longest = leading == 2 ? LONGEST_LINE : LONGEST_OF_MANY_LINES;
  const int axis = tokens(2) > longest ? 2 : leading;
  int64_t tasks = plan.batch * plan.heads;
  for (const Axis& a : plan.axis) tasks *= a.dilation;
  int64_t count = tasks % call.threads == 0 ? 1 : (TASKS_PER_THREAD * call.threads + tasks - 1) / std::max<int64_t>(tasks, 1);
  if (axis == 2) count = std::max(count, (tokens(2) + longest - 1) / longest);
  const int64_t shortest = (has_gradients ? 3 : 1) * plan.axis[axis].kernel_size + plan.axis[axis].stride;
  return {axis, static_cast<int>(std::max<int64_t>(1, std::min(count, tokens(axis) / shortest)))};
}

// All heads of a token are adjacent in memory, so a task processes a group of heads, band by band. There are as few groups
// as keep all threads busy. For dense submaps the bias is larger than the data; they have one head per group.
inline int64_t count_head_groups(const Call& call, int strips) {
  int n[3];
  for (int i = 0; i < 3; ++i) n[i] = call.plan->axis[i].length / call.plan->axis[i].dilation;
  if (DenseMap::fits(*call.plan, n)) return call.plan->heads;
  int64_t tasks = call.plan->batch * strips;
  for (const Axis& axis : call.plan->axis) tasks *= axis.dilation;
  const int64_t wanted = call.threads == 1 ? 1 : (TASKS_PER_THREAD * call.threads + tasks - 1) / tasks;
  return std::min(std::max(wanted, (call.plan->heads + MAX_HEADS - 1) / MAX_HEADS), call.plan->heads);
}

// Operator: a class template over the Map, with a constructor (call, map, scratch). start(map, submap) is called for each
// submap, and operator()(block) for each block.
template <template <class> class Operator>
class Runner {
 public:
  explicit Runner(const Call& call) : call_(call), plan_(*call.plan) {
    needs_ = Operator<LineMap>::needs();
    const bool has_gradients = needs_.grad[KEYS] || needs_.grad[VALUES];
    strips_ = choose_strips(call, has_gradients);
    phases_ = has_gradients && strips_.count > 1 ? 2 : 1;
    residues_ = 1;
    for (const Axis& axis : plan_.axis) residues_ *= axis.dilation;
  }

  void run() {
    const int64_t table = table_size(plan_);
    if (call_.grad_rpb) std::memset(call_.grad_rpb, 0, sizeof(float) * plan_.heads * table);
    if (!plan_.batch || !plan_.heads) return;
    groups_ = count_head_groups(call_, strips_.count);
    for (int phase = 0; phase < phases_; ++phase) {
      const int64_t chunks = count_chunks(tasks(phase));
      // Each chunk has its own bias gradient. They are summed in order afterwards, so the sum is deterministic.
      std::vector<std::vector<float>> gradients(chunks);
      parallel_for(chunks, call_.threads, [&](int64_t chunk) {
        const int64_t first = tasks(phase) * chunk / chunks, end = tasks(phase) * (chunk + 1) / chunks;
        if (call_.grad_rpb) gradients[chunk].resize((end_head(phase, end - 1) - first_head(phase, first)) * table);
        run_tasks(phase, first, end, call_.grad_rpb ? gradients[chunk].data() : nullptr);
      });
      if (!call_.grad_rpb) continue;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        float* to = call_.grad_rpb + first_head(phase, tasks(phase) * chunk / chunks) * table;
        for (size_t i = 0; i < gradients[chunk].size(); ++i) to[i] += gradients[chunk][i];
      }
    }
  }

 private:
  const Call& call_;
  const Plan& plan_;
  Needs needs_;
  Strips strips_;
  int phases_;
  int64_t residues_, groups_ = 1;

  // Tasks are ordered by group of heads, image, residue class, strip.
  int strips_in(int phase) const { return (strips_.count - phase + phases_ - 1) / phases_; }
  int64_t tasks_per_group(int phase) const { return plan_.batch * residues_ * strips_in(phase); }
  int64_t tasks(int phase) const { return groups_ * tasks_per_group(phase); }
  int64_t first_head(int phase, int64_t task) const { return plan_.heads * (task / tasks_per_group(phase)) / groups_; }
  int64_t end_head(int phase, int64_t task) const { return plan_.heads * (task / tasks_per_group(phase) + 1) / groups_; }

  // Chunks are the units of scheduling. Each creates its own maps, so there are few, of nearly equal size.
  int64_t count_chunks(int64_t tasks) const {
    const int64_t chunks = int64_t(CHUNKS_PER_THREAD) * call_.threads;
    return tasks % chunks == 0 || tasks > FEW_TASKS * chunks ? chunks : std::min(tasks, FEW_TASKS * chunks);
  }

  Submap submap(int phase, int64_t task) const {
    const int64_t rest = task % tasks_per_group(phase) / strips_in(phase);
    return Submap(call_, first_head(phase, task), rest / residues_, rest % residues_);
  }

  // Processes the submaps of one kind of Map, with one map per head.
  template <class Map>
  class Worker {
   public:
    Worker(const Call& call, const Needs& needs, float* gradient, int64_t first_head, Scratch& scratch, Strips strips)
        : call_(call), needs_(needs), scratch_(scratch), strips_(strips), shared_(call, gradient, first_head) {}

    void run(Submap submap, int heads, int strip) {
      const int64_t first = submap.head;
      for (int h = 0; h < heads; ++h) {
        if (h == static_cast<int>(maps_.size())) add_map();
        submap.head = first + h;
        maps_[h]->begin(submap, strip, h);
      }
      shared_.prepare(first, heads);
      const int bands = maps_[0]->bands();
      for (int band = 0; band < bands; ++band)
        for (int h = 0; h < heads; ++h) {
          submap.head = first + h;
          op_->start(*maps_[h], submap);
          maps_[h]->for_each_block(band, [&](const Block& block) { (*op_)(block); });
        }
      for (int h = 0; h < heads; ++h) maps_[h]->end();
    }

   private:
    const Call& call_;
    const Needs& needs_;
    Scratch& scratch_;
    Strips strips_;
    typename Map::Shared shared_;
    std::vector<std::unique_ptr<Map>> maps_;
    std::unique_ptr<Operator<Map>> op_;

    void add_map() {
      maps_.push_back(std::make_unique<Map>(call_, needs_, shared_, scratch_, strips_));
      if (!op_) op_ = std::make_unique<Operator<Map>>(call_, *maps_[0], scratch_);
    }
  };

  void run_tasks(int phase, int64_t first, int64_t end, float* gradient) const {
    Scratch& scratch = thread_scratch();
    Worker<LineMap> lines(call_, needs_, gradient, first_head(phase, first), scratch, strips_);
    Worker<DenseMap> dense(call_, needs_, gradient, first_head(phase, first), scratch, strips_);
    for (int64_t task = first; task < end; ++task) {
      const Submap current = submap(phase, task);
      const int heads = static_cast<int>(end_head(phase, task) - current.head);
      const int strip = static_cast<int>(task % strips_in(phase)) * phases_ + phase;
      if (DenseMap::fits(plan_, current.n)) dense.run(current, heads, strip);
      else lines.run(current, heads, strip);
    }
  }
};

// Runs a call. Returns a status as in export.h; no exception leaves the library.
template <template <class> class Operator>
int run(const Call& call) {
  try {
    Runner<Operator>(call).run();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  } catch (...) {
    return 2;
  }
}

}  // namespace natten
