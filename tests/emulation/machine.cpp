// Fibers, which run the threads of a block, and the instructions of a whole warp.
#include <cmath>
#include <cstring>
#include <dlfcn.h>

#include <cstdio>

#include "runtime.h"

namespace emulation {

Index3 thread_index, block_index, block_size, grid_size;
Thread* current = nullptr;

namespace {

// Threads that wait for each other. The last one to arrive performs the action, then all continue.
struct Meeting {
  const void* site = nullptr;
  std::vector<Thread*> waiting;
};

std::vector<Thread> threads;
std::vector<Thread*> ready;
std::vector<Meeting> warps;
Meeting block;
Context home;
Random draw;
bool has_failed = false;
char error[512];
void (*body)(const void*) = nullptr;
const void* parameters = nullptr;

#if defined(__x86_64__)
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
void switch_to(Context& from, Context& to) { emulation_switch(&from.stack_pointer, to.stack_pointer); }
void prepare(Context& context, char* stack, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack + STACK_BYTES) & ~uintptr_t(15);
  auto* words = reinterpret_cast<void**>(top) - 2;
  words[0] = reinterpret_cast<void*>(entry);  // the return address; `ret` leaves the stack as after a call
  words[1] = nullptr;
  context.stack_pointer = words - 6;
}
#else
void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = STACK_BYTES;
  makecontext(&context.context, entry, 0);
}
#endif

void leave() { switch_to(current->context, home); }

void thread_main() {
  body(parameters);
  if (current->groups.size() > 1 || !current->groups.front().empty())
    fail("a thread ended without waiting for its copies (cp.async)");
  current->is_done = true;
  leave();
}

// Waits until `expected` threads have met at `site`. The last one calls `act` with all of them.
template <class Last>
void meet(Meeting& meeting, size_t expected, const void* site, Last act) {
  if (meeting.waiting.empty()) meeting.site = site;
  else if (meeting.site != site) fail("threads of one block or warp wait at different instructions");
  meeting.waiting.push_back(current);
  if (meeting.waiting.size() == expected) {
    act(meeting.waiting);
    ready.insert(ready.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
  }
  leave();
}

void start_threads() {
  warps.assign(threads.size() / 32, {});
  block = {};
  ready.clear();
  for (size_t i = 0; i < threads.size(); ++i) {
    Thread& thread = threads[i];
    thread.index = {unsigned(i), 0, 0};
    thread.number = i, thread.warp = i / 32, thread.lane = i % 32;
    thread.is_done = false;
    thread.groups.assign(1, {});
    prepare(thread.context, thread.stack.get(), thread_main);
    ready.push_back(&thread);
  }
}

void run_threads() {
  while (!ready.empty() && !has_failed) {
    const size_t at = draw() % ready.size();
    std::swap(ready[at], ready.back());
    current = ready.back();
    ready.pop_back();
    thread_index = current->index;
    switch_to(home, current->context);
  }
  current = nullptr;
  for (const Thread& thread : threads)
    if (!has_failed && !thread.is_done) {
      has_failed = true;
      std::strcpy(error, "deadlock: some threads wait for threads that have ended or wait elsewhere");
    }
}

}  // namespace

uintptr_t offset_of(const void* code) {
  Dl_info info{};
  dladdr(code, &info);
  return reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(info.dli_fbase);
}

void fail(const char* text) {
  if (!has_failed) std::snprintf(error, sizeof error, "%s", text);
  has_failed = true;
  ready.clear();
  leave();
}

void fail_at(const char* text, const void* one, const void* other) {
  char line[400];
  const unsigned long first = offset_of(one), second = other ? offset_of(other) : 0;
  const int length = std::snprintf(line, sizeof line, "block %u, thread %d: %s at {%#lx}", block_index.x,
                                   current->number, text, first);
  if (other) std::snprintf(line + length, sizeof line - length, ", after {%#lx}", second);
  fail(line);
  __builtin_unreachable();
}

void meet_block(const void* site) {
  meet(block, threads.size(), site, [](auto&) {
    order_block_accesses();
    for (size_t warp = 0; warp < warps.size(); ++warp) end_warp_segment(warp);
  });
}

void meet_warp(const void* site, const void* argument, void* result, Act act) {
  current->argument = argument, current->result = result;
  meet(warps[current->warp], 32, site, [act](std::vector<Thread*>& waiting) {
    Lane* lanes[32];
    for (Thread* thread : waiting) lanes[thread->lane] = thread;
    if (act) act(lanes);
    end_warp_segment(waiting.front()->warp);
  });
}

void order_warp(const void* site) {
  meet(warps[current->warp], 32, site, [](std::vector<Thread*>& waiting) {
    order_warp_accesses(waiting.front()->warp);
    end_warp_segment(waiting.front()->warp);
  });
}

const char* run(void (*kernel)(const void*), const void* given, Index3 grid, unsigned count, size_t shared_bytes,
                uint64_t seed) {
  if (count % 32) return "the number of threads per block must be a multiple of 32";
  body = kernel, parameters = given, grid_size = grid, block_size = {count, 1, 1};
  has_failed = false;
  draw.state = seed;
  if (threads.size() != count) threads = std::vector<Thread>(count);
  start_run(shared_bytes);
  std::vector<Index3> blocks;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
  for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[draw() % i]);
  for (const Index3& index : blocks) {
    block_index = index;
    start_block(count / 32);
    start_threads();
    run_threads();
    if (has_failed) return error;
    end_block();
  }
  return nullptr;
}

// ---------------------------------------------------------------------------------------------------------------------
// Matrix instructions, according to the tables of the PTX manual
// ---------------------------------------------------------------------------------------------------------------------

namespace {

// Of each matrix, a lane receives the element (lane / 4, 2 (lane % 4)) and the next in its row. If transposed, it receives
// the element (2 (lane % 4), lane / 4) and the next in its column.
template <int COUNT, bool IS_TRANSPOSED>
void give_matrices(Lane* const* lanes) {
  for (int m = 0; m < COUNT; ++m) {
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) std::memcpy(matrix[r], lanes[8 * m + r]->argument, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const unsigned low = IS_TRANSPOSED ? matrix[j][i] : matrix[i][j];
      const unsigned high = IS_TRANSPOSED ? matrix[j + 1][i] : matrix[i][j + 1];
      static_cast<unsigned*>(lanes[lane]->result)[m] = low | high << 16;
    }
  }
}

struct Product {
  const unsigned *a, *b;
  Format format;
  int depth;
};

float value_of(uint16_t bits, Format format) {
  if (format == HALF) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return value;
  }
  const unsigned wide = unsigned(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

void give_products(Lane* const* lanes) {
  float left[16][16], right[16][8];
  const Product& first = *static_cast<const Product*>(lanes[0]->argument);
  const Format format = first.format;
  const int depth = first.depth;
  for (int lane = 0; lane < 32; ++lane) {
    const auto& given = *static_cast<const Product*>(lanes[lane]->argument);
    const int group = lane / 4, pair = lane % 4 * 2;
    if (format == TFLOAT) {
      for (int i = 0; i < 4; ++i)
        std::memcpy(&left[group + 8 * (i % 2)][lane % 4 + 4 * (i / 2)], &given.a[i], 4);
      for (int i = 0; i < 2; ++i) std::memcpy(&right[lane % 4 + 4 * i][group], &given.b[i], 4);
      continue;
    }
    for (int i = 0; i < depth / 4; ++i)
      for (int e = 0; e < 2; ++e)
        left[group + 8 * (i % 2)][pair + 8 * (i / 2) + e] = value_of(given.a[i] >> 16 * e, format);
    for (int i = 0; i < depth / 8; ++i)
      for (int e = 0; e < 2; ++e) right[pair + 8 * i + e][group] = value_of(given.b[i] >> 16 * e, format);
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* out = static_cast<float*>(lanes[lane]->result);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < depth; ++k) sum += left[row][k] * right[k][column];
      out[i] += sum;
    }
  }
}

}  // namespace

void load_matrices(const void* site, unsigned* out, const void* row, int count, bool is_transposed) {
  static const Act acts[2][5] = {
      {nullptr, give_matrices<1, false>, give_matrices<2, false>, nullptr, give_matrices<4, false>},
      {nullptr, give_matrices<1, true>, give_matrices<2, true>, nullptr, give_matrices<4, true>}};
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix at an address that is not a multiple of 16");
  if (current->lane < 8 * count) access(row, 16, MATRIX, __builtin_return_address(0));
  meet_warp(site, row, out, acts[is_transposed][count]);
}

void multiply_add(const void* site, float* c, const unsigned* a, const unsigned* b, Format format, int depth) {
  for (int i = 0; format == TFLOAT && i < 6; ++i)
    if ((i < 4 ? a[i] : b[i - 4]) & 0x1fff) fail("mma.tf32 with an operand that is not rounded");
  const Product product{a, b, format, depth};
  meet_warp(site, &product, c, give_products);
}

}  // namespace emulation
