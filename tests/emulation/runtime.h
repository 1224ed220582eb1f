// The state that machine.cpp and memory.cpp share.
#pragma once

#include <memory>
#include <vector>

#include "machine.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
#else
struct Context {
  ucontext_t context;
};
#endif

constexpr size_t STACK_BYTES = 256 << 10;

struct Copy {
  char* to;
  const void* from;
  int bytes, given;
};

struct Thread : Lane {
  Context context;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};  // not initialized, so that unused pages take no memory
  Index3 index{};
  int number = 0, warp = 0, lane = 0;
  bool is_done = false;
  std::vector<std::vector<Copy>> groups;  // pending groups of cp.async; the last one is open
};

extern Thread* current;

// splitmix64
struct Random {
  uint64_t state = 0;
  uint64_t operator()() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
};

// memory.cpp: shared memory of one block after the other.
void start_run(size_t shared_bytes);
void start_block(int warps);
void end_block();
void order_block_accesses();
void order_warp_accesses(int warp);
void end_warp_segment(int warp);  // the threads of a warp have met
// The position of code in its library.
uintptr_t offset_of(const void* code);
// Ends the run with an error message that names places in the code, as {0x...}.
[[noreturn]] void fail_at(const char* text, const void* one, const void* other);

enum Kind { READ, WRITE, ATOMIC, MATRIX, COPY };
// Checks, and counts, an access of the thread that runs, from the place `code`. Does nothing outside shared memory.
void access(const void* at, int bytes, Kind kind, const void* code);

}  // namespace emulation
