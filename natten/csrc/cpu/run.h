// Divides a call into tasks, distributes them over threads, and processes each with a Map and an operator.
//
// The words of this folder, from the call down to the registers:
//
//   submap    one image and residue class of the dilation: a problem without dilation              submap.h
//   strip     a piece of a submap along one axis                                                   map.h
//   task      a strip, and some heads of keys                                                      map.h
//   chunk     successive tasks, which a thread runs with the same buffers                          run.h
//   phase     chunks that run at the same time; a second phase adds to gradients of the first      run.h
//   line      the tokens of a submap along its last axis; a ring buffer holds lines of keys        keys.h
//   band      up to MAX_ROWS lines of queries                                                      map.h
//   group     up to W adjacent queries of a line                                                   groups.h
//   block     a group of each line of a band: up to MAX_ROWS rows of W queries                     block.h
//   visit     keys of a line, and the rows of a block that see them: a call of products.h          block.h
//   kind      a bias that groups share, because the steps between their windows are the same       bias.h
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <optional>
#include <vector>

#include "map.h"
#include "parallel.h"

namespace natten {

constexpr int CHUNKS_PER_THREAD = 2, TASKS_PER_THREAD = 4;
constexpr int FEW_TASKS = 8;         // if there are at most as many tasks per chunk, each becomes a chunk
constexpr int64_t ROW_BYTES = 256;   // a task has so many heads that it reads this much of each token, or more
// Largest number of queries in a strip of the last axis, so that the data of a thread fits into its cache.
constexpr int64_t LONGEST_LINE = 1024, LONGEST_OF_MANY_LINES = 112;

// How a call is divided: tasks have `heads` heads of keys and a strip. Strips are pieces of the last axis of a submap if it
// is long, else of the first axis with more than one token. Neighboring strips share keys. With gradients, strips 0, 2, ..
// run before strips 1, 3, ..; strips of one phase share no keys.
struct Division {
  int64_t heads;
  Strips strips;

  Division(const Call& call, int64_t submaps, bool has_gradients) {
    const Plan& plan = *call.plan;
    const int64_t kv_heads = std::max<int64_t>(plan.kv_heads, 1);
    const auto tokens = [&](int i) { return plan.axis[i].length / plan.axis[i].dilation; };  // in the shortest class
    const int leading = plan.axis[0].length > 1 ? 0 : plan.axis[1].length > 1 ? 1 : 2;
    const int64_t longest = leading == 2 ? LONGEST_LINE : LONGEST_OF_MANY_LINES;
    const int axis = tokens(2) > longest ? 2 : leading;
    const int64_t kernel = plan.axis[axis].kernel_size, group = axis == 2 ? W : 0;
    const auto tasks = [&] { return std::max<int64_t>(submaps, 1) * ((kv_heads + heads - 1) / heads); };
    // All heads of a token are adjacent in memory, which is slow to read in shorter pieces than ROW_BYTES. But there are
    // fewer heads per task where short strips would be needed to keep all threads busy.
    const int64_t row = std::max<int64_t>(plan.dim, 1) * element_size(plan.dtype);
    const auto wanted = [&] { return (TASKS_PER_THREAD * call.threads + tasks() - 1) / tasks(); };
    heads = std::min(kv_heads, (ROW_BYTES + row - 1) / row);
    while (heads > 1 && call.threads > 1 && tokens(axis) / wanted() < 2 * kernel + group) heads = (heads + 1) / 2;
    int64_t count = tasks() % call.threads == 0 ? 1 : wanted();
    if (axis == 2) count = std::max(count, (tokens(2) + longest - 1) / longest);
    const int64_t shortest = (has_gradients ? 3 : 1) * kernel + plan.axis[axis].stride + group;
    strips = {axis, static_cast<int>(std::max<int64_t>(1, std::min(count, tokens(axis) / shortest)))};
  }
};

// Operator: a class with a constructor (call, map, scratch), start(submap, head) and operator()(block); see Map::run.
template <class Operator>
class Runner {
 public:
  explicit Runner(const Call& call) : call_(call), plan_(*call.plan), needs_(Operator::needs()) {
    const bool has_gradients = needs_.grad[KEYS] || needs_.grad[VALUES];
    for (const Axis& axis : plan_.axis) residues_ *= axis.dilation;
    const Division division(call, plan_.batch * residues_, has_gradients);
    heads_ = division.heads, strips_ = division.strips;
    phases_ = has_gradients && strips_.count > 1 ? 2 : 1;
  }

  void run() {
    const int64_t table = table_size(plan_);
    if (call_.grad_rpb) std::memset(call_.grad_rpb, 0, sizeof(float) * plan_.heads * table);
    if (!plan_.batch || !plan_.heads) return;
    for (int phase = 0; phase < phases_; ++phase) {
      const int64_t chunks = count_chunks(tasks(phase));
      // Each chunk has its own bias gradient. They are summed in order afterwards, so the sum is deterministic.
      std::vector<std::vector<float>> gradients(chunks);
      parallel_for(chunks, call_.threads, [&](int64_t chunk) {
        const int64_t first = tasks(phase) * chunk / chunks, end = tasks(phase) * (chunk + 1) / chunks;
        if (call_.grad_rpb) gradients[chunk].resize(plan_.heads * table);
        run_tasks(phase, first, end, call_.grad_rpb ? gradients[chunk].data() : nullptr);
      });
      for (const std::vector<float>& gradient : gradients)
        for (size_t i = 0; i < gradient.size(); ++i) call_.grad_rpb[i] += gradient[i];
    }
  }

 private:
  const Call& call_;
  const Plan& plan_;
  const Needs needs_;
  Strips strips_;
  int phases_;
  int64_t residues_ = 1, heads_;  // residue classes; heads of keys per task

  int64_t head_groups() const { return (plan_.kv_heads + heads_ - 1) / heads_; }

  // Tasks are ordered by image, residue class, group of heads, strip.
  int strips_in(int phase) const { return (strips_.count - phase + phases_ - 1) / phases_; }
  int64_t tasks(int phase) const { return plan_.batch * residues_ * head_groups() * strips_in(phase); }

  // Chunks are the units of scheduling. Each creates its own maps, so there are few, of nearly equal size.
  int64_t count_chunks(int64_t tasks) const {
    const int64_t chunks = int64_t(CHUNKS_PER_THREAD) * call_.threads;
    return tasks % chunks == 0 || tasks > FEW_TASKS * chunks ? chunks : std::min(tasks, FEW_TASKS * chunks);
  }

  // A map of one kind and what works on it.
  struct Worker {
    Bias bias;
    Map map;
    Operator op;

    Worker(const Call& call, const Needs& needs, float* gradient, Scratch& scratch, Strips strips, int heads, bool dense)
        : bias(call, scratch, Operator::BIAS_FACTOR, gradient), map(call, needs, bias, scratch, strips, heads, dense),
          op(call, map, scratch) {}
  };

  Task task(int phase, int64_t i) const {
    const int64_t strips = strips_in(phase), outer = i / strips / head_groups(), head = i / strips % head_groups() * heads_;
    return {Submap(call_, outer / residues_, outer % residues_), head,
            static_cast<int>(std::min(heads_, plan_.kv_heads - head)), static_cast<int>(i % strips) * phases_ + phase};
  }

  void run_tasks(int phase, int64_t first, int64_t end, float* gradient) const {
    Scratch& scratch = thread_scratch();
    std::optional<Worker> workers[2];  // for submaps that are not dense, and that are
    for (int64_t i = first; i < end; ++i) {
      const Task current = task(phase, i), next = task(phase, std::min(i + 1, end - 1));
      const bool dense = Map::is_dense(plan_, current.submap.n);
      if (!workers[dense]) workers[dense].emplace(call_, needs_, gradient, scratch, strips_, heads_, dense);
      workers[dense]->map.run(current, i + 1 < end ? &next : nullptr, workers[dense]->op);
    }
  }
};

// Runs a call. Returns a status as in export.h; no exception leaves the library.
template <class Operator>
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
