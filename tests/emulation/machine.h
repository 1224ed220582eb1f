// What emulation.h needs of the emulated machine, which machine.cpp and memory.cpp implement. These are compiled without
// instrumentation, once, and linked to each kernel.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

struct Index3 {
  unsigned x, y, z;
};
extern Index3 thread_index, block_index, block_size, grid_size;  // of the fiber that runs

// Ends the run with an error message.
void fail(const char* text);

// ---------------------------------------------------------------------------------------------------------------------
// Threads that wait for each other
// ---------------------------------------------------------------------------------------------------------------------

// One thread's part of a warp-wide instruction.
struct Lane {
  const void* argument;
  void* result;
};
using Act = void (*)(Lane* const* lanes);  // 32 of them

// Waits for all threads of the block. `site` identifies the statement; all must meet at the same one.
void meet_block(const void* site);
// Waits for all threads of the warp. The last one to arrive calls `act`. This orders no accesses to memory.
void meet_warp(const void* site, const void* argument, void* result, Act act);
// __syncwarp: waits for all threads of the warp, and orders their accesses to memory.
void order_warp(const void* site);

enum Format { HALF, BFLOAT, TFLOAT };
void load_matrices(const void* site, unsigned* out, const void* row, int count, bool is_transposed);
void multiply_add(const void* site, float* c, const unsigned* a, const unsigned* b, Format format, int depth);

// ---------------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------------

char* shared_memory();
// Copies the first `given` of `bytes`, and zeros after them or if `from` is null, when the thread waits for it.
void copy_async(void* to, const void* from, int bytes, int given);
void commit_copies();
void wait_copies(int pending);
// Moves a vector with one load and one store.
void move_vector(void* to, const void* from, int bytes);
float atomic_add(float* at, float value);

// Tells the machine which bytes of shared memory no kernel may access. It has `bytes` of it, with the guards.
struct Guards {
  Guards(size_t bytes, bool (*is_guard)(int at));
};

// Tells the machine that threads may access halves of a word. It then checks halves, which takes longer.
struct SmallAccesses {
  SmallAccesses();
};

// Runs a kernel with one parameter, at the address `parameters`. Returns null, or an error message.
const char* run(void (*body)(const void*), const void* parameters, Index3 grid, unsigned threads, size_t shared_bytes,
                uint64_t seed);

}  // namespace emulation
