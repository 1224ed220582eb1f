// Loops on several threads: PyTorch's own, or those of a pool.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace natten {

// Calls body(data) on at most `threads` threads at the same time, of which the caller is one, and waits for all of them.
// May only be called in the process that called it first, not in a forked child, where the other threads are missing.
void run_team(void (*body)(void*), void* data, int threads);

// Calls function(i) once for each i in 0 .. count-1, in any order. With one thread, it uses the calling thread. Rethrows
// exceptions.
template <class Function>
void parallel_for(int64_t count, int threads, const Function& function) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) function(i);
    return;
  }
  struct Loop {
    const Function& function;
    const int64_t count;
    std::atomic<int64_t> next{0};
    std::atomic_flag has_error = ATOMIC_FLAG_INIT;
    std::exception_ptr error = nullptr;

    void run() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        try {
          function(i);
        } catch (...) {
          if (!has_error.test_and_set()) error = std::current_exception();
        }
      }
    }
  } loop{function, count};
  run_team([](void* data) { static_cast<Loop*>(data)->run(); }, &loop, threads);
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace natten
