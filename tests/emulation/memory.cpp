// Shared memory: who accessed each word last, and how many wavefronts the accesses of a warp take.
//
// The compiler instruments the kernels as for ThreadSanitizer (-fsanitize=thread), but its calls end here. Two accesses to a
// word race if one is a write, different threads make them, and no barrier of their block or __syncwarp of their warp is
// in between. Shuffles and matrix instructions order nothing, as in CUDA's memory model. An asynchronous copy writes at any
// time between its issue and the wait: until then no thread may access the words, and they hold NaN.
#include <cstring>
#include <map>
#include <unordered_map>

#include "runtime.h"

// The variables that kernels declare as __shared__ (see emulation.h).
#if defined(__ELF__)
extern "C" {
extern char __start_natten_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_natten_shared[] __attribute__((weak, visibility("hidden")));
}
#else
static char *__start_natten_shared = nullptr, *__stop_natten_shared = nullptr;
#endif

namespace emulation {
namespace {

constexpr int NOBODY = -1, SEVERAL = -2;
int word_bytes = 4;  // the unit of checks, in bytes
constexpr size_t GUARD_BYTES = 4096;  // after shared memory

// Accesses are ordered by `block`, the number of barriers before them, and within a warp by `warp`, the number of calls of
// __syncwarp.
struct Access {
  int block = -1, warp = 0, warp_epoch = 0, thread = NOBODY;
  const void* code = nullptr;
};
struct Word {
  Access write, read;  // the last ones
  bool is_atomic = false, is_pending = false, is_guard = false;
};

struct Group {  // one execution of an instruction by a warp
  unsigned lanes = 0;
  uintptr_t addresses[32];
};
struct Site {
  Kind kind;
  int bytes;
  unsigned short seen[32] = {};
  std::vector<Group> groups;
};
// For Python: launcher.py has the same structure.
struct Total {
  uint64_t code, kind, bytes, instructions, wavefronts, fewest;
};

std::vector<char> memory;
std::vector<Word> words;
char* start = nullptr;  // of dynamic shared memory
size_t dynamic_bytes = 0, static_bytes = 0;
size_t layout_bytes = 0;
bool (*is_guard)(int) = nullptr;
int block_epoch = 0;
std::vector<int> warp_epochs;

bool is_counting = false;
std::vector<std::unordered_map<const void*, Site>> sites;  // per warp, since the threads of the warp met
std::map<std::pair<const void*, int>, Total> totals;
std::vector<Total> listed;

// The position of an address in shared memory, or -1. __shared__ variables follow dynamic memory and its guard.
long place_of(const void* at) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  const size_t offset = address - reinterpret_cast<uintptr_t>(start);
  if (offset < dynamic_bytes + GUARD_BYTES) return offset;
  const size_t fixed = address - reinterpret_cast<uintptr_t>(__start_natten_shared);
  return fixed < static_bytes ? long(dynamic_bytes + GUARD_BYTES + fixed) : -1;
}

// Whether an earlier access is ordered before one of this thread.
bool is_before(const Access& access) {
  if (access.block != block_epoch) return true;
  if (access.warp != current->warp) return false;
  return access.warp_epoch != warp_epochs[current->warp] || access.thread == current->number;
}

// Adds an access of this thread to those that later ones must be ordered after.
void add(Access& last, const void* code) {
  const Access mine{block_epoch, current->warp, warp_epochs[current->warp], current->number, code};
  const bool is_new = last.block != mine.block || (last.warp == mine.warp && last.warp_epoch != mine.warp_epoch);
  if (is_new) last = mine;
  else if (last.warp != mine.warp) last.warp = SEVERAL, last.thread = SEVERAL;
  else if (last.thread != mine.thread) last.thread = SEVERAL;
  last.code = code;
}

void check(Word& word, Kind kind, const void* code) {
  const bool is_write = kind == WRITE || kind == COPY || kind == ATOMIC;
  const Access &write = word.write, &read = word.read;
  if (word.is_guard) fail_at("an access beyond a region of shared memory", code, nullptr);
  if (word.is_pending) fail_at("an access to shared memory while a copy (cp.async) may write there", code, write.code);
  if (!is_write && write.block < 0) fail_at("a read of shared memory that nothing has written", code, nullptr);
  if (write.block >= 0 && !is_before(write) && !(kind == ATOMIC && word.is_atomic))
    fail_at(is_write ? "a race of two writes to shared memory" : "a race: a read of shared memory", code, write.code);
  if (is_write && read.block >= 0 && !is_before(read))
    fail_at("a race: a write to shared memory that was read", code, read.code);
}

void mark(Word& word, Kind kind, const void* code) {
  if (kind == READ || kind == MATRIX) return add(word.read, code);
  if (kind != ATOMIC || !word.is_atomic) word.write = {};
  add(word.write, code);
  word.read = {};
  word.is_atomic = kind == ATOMIC;
  word.is_pending = kind == COPY;
}

void count(const void* at, int bytes, Kind kind, const void* code) {
  const int lane = current->lane;
  Site& site = sites[current->warp][code];
  site.kind = kind, site.bytes = bytes;
  const size_t index = site.seen[lane]++;
  if (site.groups.size() <= index) site.groups.emplace_back();
  Group& group = site.groups[index];
  group.lanes |= 1u << lane;
  group.addresses[lane] = reinterpret_cast<uintptr_t>(at);
}

// A wavefront delivers 32 banks of 4 bytes. Accesses of 8 and 16 bytes are made by half and quarter warps.
int wavefronts(const Group& group, int bytes, bool is_fewest) {
  const int phase_lanes = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;
  int sum = 0;
  for (int first = 0; first < 32; first += phase_lanes) {
    std::vector<uintptr_t> found[32];
    size_t most = 0;
    for (int lane = first; lane < first + phase_lanes; ++lane) {
      if (!(group.lanes >> lane & 1)) continue;
      for (uintptr_t word = group.addresses[lane] / 4; word <= (group.addresses[lane] + bytes - 1) / 4; ++word) {
        auto& bank = found[word % 32];
        bool is_there = false;
        for (uintptr_t other : bank) is_there |= other == word;
        if (!is_there) bank.push_back(word);
        if (bank.size() > most) most = bank.size();
      }
    }
    sum += is_fewest ? most > 0 : most;
  }
  return sum;
}

}  // namespace

Guards::Guards(size_t bytes, bool (*is_guard_at)(int)) {
  layout_bytes = bytes;
  is_guard = is_guard_at;
}

SmallAccesses::SmallAccesses() { word_bytes = 2; }

char* shared_memory() { return start; }

void start_run(size_t shared_bytes) {
  dynamic_bytes = layout_bytes > shared_bytes ? layout_bytes : shared_bytes;
  static_bytes = __start_natten_shared ? __stop_natten_shared - __start_natten_shared : 0;
  memory.assign(dynamic_bytes + GUARD_BYTES + 128, 0);
  start = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 127) & ~uintptr_t(127));
  totals.clear();
}

void start_block(int warps) {
  std::memset(start, 0xff, dynamic_bytes + GUARD_BYTES);
  if (static_bytes) std::memset(__start_natten_shared, 0xff, static_bytes);
  words.assign((dynamic_bytes + GUARD_BYTES + static_bytes + word_bytes - 1) / word_bytes, {});
  for (size_t at = 0; at < dynamic_bytes + GUARD_BYTES; at += word_bytes)
    words[at / word_bytes].is_guard = at >= dynamic_bytes || (is_guard && is_guard(at));
  block_epoch = 0;
  warp_epochs.assign(warps, 0);
  sites.assign(warps, {});
}

void end_block() {
  for (size_t warp = 0; warp < sites.size(); ++warp) end_warp_segment(warp);
}

void order_block_accesses() { ++block_epoch; }
void order_warp_accesses(int warp) { ++warp_epochs[warp]; }

void end_warp_segment(int warp) {
  if (!is_counting || sites[warp].empty()) return;
  for (auto& [code, site] : sites[warp]) {
    Total& total = totals[{code, site.kind}];
    total.code = offset_of(code), total.kind = site.kind, total.bytes = site.bytes;
    for (const Group& group : site.groups) {
      total.instructions += 1;
      total.wavefronts += wavefronts(group, site.bytes, false);
      total.fewest += wavefronts(group, site.bytes, true);
    }
  }
  sites[warp].clear();
}

void access(const void* at, int bytes, Kind kind, const void* code) {
  if (!current) return;
  const long first = place_of(at);
  if (first < 0) return;
  for (long word = first / word_bytes; word <= (first + bytes - 1) / word_bytes; ++word) {
    check(words[word], kind, code);
    mark(words[word], kind, code);
  }
  if (is_counting) count(at, bytes, kind, code);
}

namespace {

void check_alignment(const void* at, int bytes, const void* code) {
  if (current && reinterpret_cast<uintptr_t>(at) % bytes) fail_at("a misaligned access to memory", code, nullptr);
}

void move(void* to, const void* from, int bytes, const void* code) {
  access(from, bytes, READ, code);
  access(to, bytes, WRITE, code);
  std::memmove(to, from, bytes);
}

}  // namespace

void copy_async(void* to, const void* from, int bytes, int given) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    fail("cp.async at an address that is not a multiple of its size");
  if (given > bytes) fail("cp.async of more bytes than its size");
  access(to, bytes, COPY, __builtin_return_address(0));
  std::memset(to, 0xff, bytes);
  current->groups.back().push_back({static_cast<char*>(to), from, bytes, given});
}

void commit_copies() { current->groups.emplace_back(); }

void wait_copies(int pending) {
  auto& groups = current->groups;
  while (groups.size() > size_t(pending) + 1) {
    for (const Copy& copy : groups.front()) {
      const int given = copy.from ? copy.given : 0;
      if (given) std::memcpy(copy.to, copy.from, given);
      std::memset(copy.to + given, 0, copy.bytes - given);
      for (long word = place_of(copy.to) / word_bytes, end = word + copy.bytes / word_bytes; word < end; ++word) {
        words[word].is_pending = false;
        const void* code = words[word].write.code;
        words[word].write = {};
        add(words[word].write, code);  // the write is over now
      }
    }
    groups.erase(groups.begin());
  }
}

// Moves a vector, with one instruction.
void move_vector(void* to, const void* from, int bytes) {
  const void* code = __builtin_return_address(0);
  check_alignment(to, bytes, code), check_alignment(from, bytes, code);
  move(to, from, bytes, code);
}

float atomic_add(float* at, float value) {
  access(at, 4, ATOMIC, __builtin_return_address(0));
  const float before = *at;
  *at += value;
  return before;
}

}  // namespace emulation

extern "C" {

__attribute__((visibility("default"))) void emulation_count(int on) { emulation::is_counting = on; }
__attribute__((visibility("default"))) size_t emulation_counts(const emulation::Total** out) {
  emulation::listed.clear();
  for (auto& entry : emulation::totals) emulation::listed.push_back(entry.second);
  *out = emulation::listed.data();
  return emulation::listed.size();
}

// What the instrumentation calls.
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define EMULATION_ACCESS(bytes)                                                                                     \
  void __tsan_read##bytes(void* at) {                                                                               \
    emulation::check_alignment(at, bytes, __builtin_return_address(0));                                             \
    emulation::access(at, bytes, emulation::READ, __builtin_return_address(0));                                     \
  }                                                                                                                 \
  void __tsan_write##bytes(void* at) {                                                                              \
    emulation::check_alignment(at, bytes, __builtin_return_address(0));                                             \
    emulation::access(at, bytes, emulation::WRITE, __builtin_return_address(0));                                    \
  }                                                                                                                 \
  void __tsan_unaligned_read##bytes(void* at) {                                                                     \
    emulation::access(at, bytes, emulation::READ, __builtin_return_address(0));                                     \
  }                                                                                                                 \
  void __tsan_unaligned_write##bytes(void* at) {                                                                    \
    emulation::access(at, bytes, emulation::WRITE, __builtin_return_address(0));                                    \
  }
EMULATION_ACCESS(1)
EMULATION_ACCESS(2)
EMULATION_ACCESS(4)
EMULATION_ACCESS(8)
EMULATION_ACCESS(16)
void __tsan_read_range(void* at, size_t bytes) {
  emulation::access(at, bytes, emulation::READ, __builtin_return_address(0));
}
void __tsan_write_range(void* at, size_t bytes) {
  emulation::access(at, bytes, emulation::WRITE, __builtin_return_address(0));
}
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  return emulation::move(to, from, bytes, __builtin_return_address(0)), to;
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) { return __tsan_memcpy(to, from, bytes); }
void* __tsan_memset(void* to, int value, size_t bytes) {
  emulation::access(to, bytes, emulation::WRITE, __builtin_return_address(0));
  return std::memset(to, value, bytes);
}
}
