// Memory that a thread keeps between calls, because a new allocation can take longer than a small problem.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>
#include <vector>

namespace natten {

// An odd number of units, because distances of a power of two map to the same cache sets.
constexpr int uncrowded(int units) { return units | 1; }

inline int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

  // Makes all memory available again.
  void reset() {
    size_t total = 0;
    for (const Block& block : blocks_) total += block.size;
    if (blocks_.size() > 1 || total > KEPT) {
      release();
      if (total <= KEPT) add(total);
    }
    if (!blocks_.empty()) blocks_.back().used = 0;
  }

  // Returns uninitialized floats or ints, aligned to a cache line.
  template <class T = float>
  T* take(size_t count) {
    static_assert(sizeof(T) == sizeof(float));
    const size_t size = (count + 15) / 16 * 16;
#if defined(__SANITIZE_ADDRESS__)
    add(size);  // a separate allocation, so that the sanitizer detects accesses beyond its end
#endif
    if (blocks_.empty() || blocks_.back().used + size > blocks_.back().size) add(std::max(size, size_t{1} << 16));
    Block& block = blocks_.back();
    block.used += size;
    return reinterpret_cast<T*>(block.data + block.used - size);
  }

  float* take_zeros(size_t floats) {
    float* data = take(floats);
    std::memset(data, 0, floats * sizeof(float));
    return data;
  }

 private:
  static constexpr size_t KEPT = size_t{1} << 24;  // floats: 64 MiB
  static constexpr std::align_val_t ALIGNMENT{64};  // a cache line
  struct Block {
    float* data;
    size_t size, used;
  };
  std::vector<Block> blocks_;

  void add(size_t size) {
    blocks_.push_back({});
    blocks_.back().data = static_cast<float*>(::operator new(size * sizeof(float), ALIGNMENT));
    blocks_.back().size = size;
  }

  void release() {
    for (const Block& block : blocks_) ::operator delete(block.data, ALIGNMENT);
    blocks_.clear();
  }
};

// Returns the scratch of the calling thread, with all memory available.
Scratch& thread_scratch();

}  // namespace natten
