// Runs CUDA C++ on a CPU, to test arithmetic and synchronization without a GPU.
//
// Each thread of a block is a fiber. The next fiber to run is chosen at random, so code that depends on an order fails.
// A fiber runs until a barrier, a shuffle or a matrix instruction, where all threads of its block or warp must meet. If
// they cannot meet, the run ends with an error. Shared memory is initialized with NaN and followed by guard bytes that
// must not change. cp.async copies nothing until the thread waits for it. Blocks run one after another in random order.
//
// Not covered: the memory model between barriers, bank conflicts, wgmma, TMA, and whether the fragment layouts, which
// follow the PTX manual, match the hardware.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

struct Index3 {
  unsigned x, y, z;
};

// splitmix64, since <random> takes longer to compile than the kernels.
struct Random {
  uint64_t state = 0;
  uint64_t operator()() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Fibers
// ---------------------------------------------------------------------------------------------------------------------

constexpr size_t STACK_BYTES = 128 << 10;

#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
// Saves the callee-saved registers on the current stack, and restores those of the other stack.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.globl emulation_switch
.type emulation_switch, @function
.hidden emulation_switch
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");
inline void switch_to(Context& from, Context& to) { emulation_switch(&from.stack_pointer, to.stack_pointer); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack + STACK_BYTES) & ~uintptr_t(15);
  auto* words = reinterpret_cast<void**>(top) - 2;
  words[0] = reinterpret_cast<void*>(entry);  // the return address; `ret` leaves the stack as after a call
  words[1] = nullptr;
  context.stack_pointer = words - 6;
}
#else
struct Context {
  ucontext_t context;
};
inline void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = STACK_BYTES;
  makecontext(&context.context, entry, 0);
}
#endif

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool is_there;  // otherwise zeros are copied
};

struct Thread {
  Context context;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};  // not initialized, so that unused pages take no memory
  Index3 index{};
  int warp = 0, lane = 0;
  bool is_done = false;
  std::vector<std::vector<Copy>> groups;  // pending groups of cp.async; the last one is open
  const void* argument = nullptr;         // argument and result of a warp-wide instruction
  void* result = nullptr;
};

// Threads that wait for each other. The last one to arrive performs the action, then all continue.
struct Meeting {
  const void* site = nullptr;  // the instruction; all threads must meet at the same one
  std::vector<Thread*> waiting;
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<Thread*> ready;
  std::vector<Meeting> warps;
  Meeting block;
  Context home;
  Thread* current = nullptr;
  Index3 block_index{}, block_size{}, grid_size{};
  std::vector<char> shared;
  size_t shared_bytes = 0;
  const char* error = nullptr;
  Random random;
  void (*body)(const void*) = nullptr;
  const void* parameters = nullptr;
};

inline Machine machine;

inline void leave() { switch_to(machine.current->context, machine.home); }

inline void fail(const char* text) {
  if (!machine.error) machine.error = text;
  machine.ready.clear();
  leave();
}

inline void thread_main() {
  machine.body(machine.parameters);
  if (machine.current->groups.size() > 1 || !machine.current->groups.front().empty())
    machine.error = "a thread ended without waiting for its copies (cp.async)";
  machine.current->is_done = true;
  leave();
}

// Waits until `expected` threads have met at `site`. The last one calls `act` with all of them.
template <class Act>
void meet(Meeting& meeting, size_t expected, const void* site, Act act) {
  if (meeting.waiting.empty()) meeting.site = site;
  else if (meeting.site != site) fail("threads of one block or warp wait at different instructions");
  meeting.waiting.push_back(machine.current);
  if (meeting.waiting.size() == expected) {
    act(meeting.waiting);
    machine.ready.insert(machine.ready.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
  }
  leave();
}

// A warp-wide instruction. `act` receives the 32 threads in the order of their lanes.
template <class Act>
void meet_warp(const void* site, const void* argument, void* result, Act act) {
  Thread& thread = *machine.current;
  thread.argument = argument, thread.result = result;
  meet(machine.warps[thread.warp], 32, site, [&](std::vector<Thread*>& threads) {
    Thread* lanes[32];
    for (Thread* t : threads) lanes[t->lane] = t;
    act(lanes);
  });
}

constexpr size_t GUARD_BYTES = 4096;
constexpr char GUARD = 0x5a;

inline void run_block() {
  Machine& m = machine;
  m.shared.assign(m.shared_bytes + GUARD_BYTES + 128, static_cast<char>(0xff));
  const size_t count = m.threads.size();
  m.warps.assign((count + 31) / 32, {});
  m.block = {};
  m.ready.clear();
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = m.threads[i];
    thread.index = {unsigned(i), 0, 0};
    thread.warp = i / 32, thread.lane = i % 32;
    thread.is_done = false;
    thread.groups.assign(1, {});
    prepare(thread.context, thread.stack.get(), thread_main);
    m.ready.push_back(&thread);
  }
}

inline char* shared_memory() {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(machine.shared.data()) + 127) & ~uintptr_t(127));
}

inline const char* run_threads() {
  Machine& m = machine;
  std::memset(shared_memory() + m.shared_bytes, GUARD, GUARD_BYTES);
  while (!m.ready.empty() && !m.error) {
    const size_t at = m.random() % m.ready.size();
    std::swap(m.ready[at], m.ready.back());
    m.current = m.ready.back();
    m.ready.pop_back();
    switch_to(m.home, m.current->context);
  }
  if (m.error) return m.error;
  for (const Thread& thread : m.threads)
    if (!thread.is_done) return "deadlock: some threads wait for threads that have ended or wait elsewhere";
  for (size_t i = 0; i < GUARD_BYTES; ++i)
    if (shared_memory()[m.shared_bytes + i] != GUARD) return "a write beyond shared memory";
  return nullptr;
}

// Runs a kernel with one parameter, at the address `parameters`. Returns null, or an error message.
inline const char* run(void (*body)(const void*), const void* parameters, Index3 grid, unsigned threads,
                       size_t shared_bytes, uint64_t seed) {
  Machine& m = machine;
  if (threads % 32) return "the number of threads per block must be a multiple of 32";
  m.body = body, m.parameters = parameters, m.grid_size = grid, m.block_size = {threads, 1, 1};
  m.shared_bytes = shared_bytes, m.error = nullptr;
  m.random.state = seed;
  if (m.threads.size() != threads) m.threads = std::vector<Thread>(threads);
  std::vector<Index3> blocks;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
  for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[m.random() % i]);
  for (const Index3& block : blocks) {
    m.block_index = block;
    run_block();
    if (const char* error = run_threads()) return error;
  }
  return nullptr;
}

}  // namespace emulation

// ---------------------------------------------------------------------------------------------------------------------
// CUDA C++ keywords and functions
// ---------------------------------------------------------------------------------------------------------------------

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static
#define threadIdx (emulation::machine.current->index)
#define blockIdx (emulation::machine.block_index)
#define blockDim (emulation::machine.block_size)
#define gridDim (emulation::machine.grid_size)
// Identifies a statement. Threads must meet at the same one.
#define EMULATION_SITE              \
  [] {                              \
    static const char site = 0;     \
    return static_cast<const void*>(&site); \
  }()

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

inline void emulation_syncthreads(const void* site) {
  auto& m = emulation::machine;
  emulation::meet(m.block, m.threads.size(), site, [](auto&) {});
}
inline void emulation_syncwarp(const void* site) { emulation::meet_warp(site, nullptr, nullptr, [](auto&) {}); }
#define __syncthreads() emulation_syncthreads(EMULATION_SITE)
#define __syncwarp() emulation_syncwarp(EMULATION_SITE)

template <class T>
T emulation_shuffle_xor(const void* site, T value, int mask) {
  T result;
  emulation::meet_warp(site, &value, &result, [mask](emulation::Thread** lanes) {
    for (int i = 0; i < 32; ++i)
      *static_cast<T*>(lanes[i]->result) = *static_cast<const T*>(lanes[i ^ mask]->argument);
  });
  return result;
}
inline bool emulation_any(const void* site, bool value) {
  bool result;
  emulation::meet_warp(site, &value, &result, [](emulation::Thread** lanes) {
    bool any = false;
    for (int i = 0; i < 32; ++i) any |= *static_cast<const bool*>(lanes[i]->argument);
    for (int i = 0; i < 32; ++i) *static_cast<bool*>(lanes[i]->result) = any;
  });
  return result;
}
#define __any_sync(all, value) emulation_any(EMULATION_SITE, value)
#define __shfl_xor_sync(all, value, mask) emulation_shuffle_xor(EMULATION_SITE, value, mask)

inline float atomicAdd(float* at, float value) {
  const float before = *at;
  *at += value;
  return before;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float max(float a, float b) { return a > b ? a : b; }

// ---------------------------------------------------------------------------------------------------------------------
// The instructions of natten/csrc/cuda/instructions.h, according to the tables of the PTX manual
// ---------------------------------------------------------------------------------------------------------------------

namespace natten {

inline float half_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return value;
}
inline uint16_t float_to_half(float value) {
  const _Float16 rounded = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}
inline uint16_t float_to_bfloat(float value) {
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <class T>
T* to_global(T* pointer) {
  return pointer;
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal_fast(float x) { return 1 / x; }

template <int BYTES = 16>
void copy_async(void* to, const void* from, bool is_there) {
  if (reinterpret_cast<uintptr_t>(to) % BYTES || reinterpret_cast<uintptr_t>(from) % BYTES)
    emulation::fail("cp.async at an address that is not a multiple of its size");
  emulation::machine.current->groups.back().push_back({to, from, BYTES, is_there});
}
inline void commit_copies() { emulation::machine.current->groups.emplace_back(); }
template <int PENDING>
void wait_copies() {
  auto& groups = emulation::machine.current->groups;
  while (groups.size() > PENDING + 1) {
    for (const emulation::Copy& copy : groups.front()) {
      if (copy.is_there) std::memcpy(copy.to, copy.from, copy.bytes);
      else std::memset(copy.to, 0, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

// Loads COUNT matrices of 8 x 8 halves. Lane 8 m + r provides the address of row r of matrix m. Of each matrix, a lane
// receives the element (lane / 4, 2 (lane % 4)) and the next in its row. If transposed, it receives the element
// (2 (lane % 4), lane / 4) and the next in its column.
template <int COUNT, bool TRANSPOSED>
void load_matrices(unsigned* out, const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulation::fail("ldmatrix at an address that is not a multiple of 16");
  static const char site = 0;
  emulation::meet_warp(&site, row, out, [](emulation::Thread** lanes) {
    for (int m = 0; m < COUNT; ++m) {
      uint16_t matrix[8][8];
      for (int r = 0; r < 8; ++r) std::memcpy(matrix[r], lanes[8 * m + r]->argument, 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const unsigned low = TRANSPOSED ? matrix[j][i] : matrix[i][j];
        const unsigned high = TRANSPOSED ? matrix[j + 1][i] : matrix[i][j + 1];
        static_cast<unsigned*>(lanes[lane]->result)[m] = low | high << 16;
      }
    }
  });
}

inline float2 load_pair(const void* from) { return *static_cast<const float2*>(from); }

inline float tfloat(unsigned bits) {
  if (bits & 0x1fff) emulation::fail("mma.tf32 with an operand that is not rounded");
  return __uint_as_float(bits);
}
inline unsigned round_to_tfloat(float value) {
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fffe000;
  return (bits + 0x1000) & ~0x1fffu;
}

// c[16][8] += a[16][DEPTH] b[DEPTH][8]. DEPTH is 16 or 8, for Tfloat 8. A and C are row-major, B is column-major.
template <class Element, int DEPTH>
void multiply_add(float* c, const unsigned* a, const unsigned* b) {
  struct Arguments {
    const unsigned *a, *b;
  };
  const Arguments arguments{a, b};
  static const char site = 0;
  emulation::meet_warp(&site, &arguments, c, [](emulation::Thread** lanes) {
    static float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto& given = *static_cast<const Arguments*>(lanes[lane]->argument);
      const int group = lane / 4, pair = lane % 4 * 2;
      if (Element::IS_TFLOAT) {
        for (int i = 0; i < 4; ++i) left[group + 8 * (i % 2)][lane % 4 + 4 * (i / 2)] = tfloat(given.a[i]);
        for (int i = 0; i < 2; ++i) right[lane % 4 + 4 * i][group] = tfloat(given.b[i]);
        continue;
      }
      for (int i = 0; i < DEPTH / 4; ++i)
        for (int e = 0; e < 2; ++e)
          left[group + 8 * (i % 2)][pair + 8 * (i / 2) + e] = Element::widen(uint16_t(given.a[i] >> 16 * e));
      for (int i = 0; i < DEPTH / 8; ++i)
        for (int e = 0; e < 2; ++e) right[pair + 8 * i + e][group] = Element::widen(uint16_t(given.b[i] >> 16 * e));
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* out = static_cast<float*>(lanes[lane]->result);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < DEPTH; ++k) sum += left[row][k] * right[k][column];
        out[i] += sum;
      }
    }
  });
}

}  // namespace natten

#define NATTEN_SHARED_MEMORY(name) char* const name = emulation::shared_memory()
// Defines the kernel `name` and a function that runs it, for Python: emulate_NAME(parameters, grid, threads, shared, seed).
#define NATTEN_KERNEL(name, ...)                                                                                      \
  static void name(const natten::Params p);                                                                           \
  extern "C" __attribute__((visibility("default"))) const char* emulate_##name(const void* parameters, const unsigned* grid, unsigned count, size_t shared,  \
                                        uint64_t seed) {                                                              \
    return emulation::run([](const void* given) { name(*static_cast<const natten::Params*>(given)); }, parameters,    \
                          {grid[0], grid[1], grid[2]}, count, shared, seed);                                          \
  }                                                                                                                   \
  static void name(const natten::Params p)
