// Threads: with OpenMP, PyTorch's own pool; without, threads that are started for the call.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace natten {

// Calls function(i) once for each i in 0 .. count-1, in any order. With one thread, it uses the calling thread, because
// OpenMP hangs in a process forked after a parallel region. Rethrows exceptions.
template <class Function>
void parallel_for(int64_t count, int threads, const Function& function) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) function(i);
    return;
  }
  std::exception_ptr error;
  std::atomic_flag has_error = ATOMIC_FLAG_INIT;
  const auto guarded = [&](int64_t i) {
    try {
      function(i);
    } catch (...) {
      if (!has_error.test_and_set()) error = std::current_exception();
    }
  };
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) guarded(i);
#else
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next++) < count;) guarded(i);
  };
  std::vector<std::thread> team;
  team.reserve(threads - 1);
  try {
    for (int t = 1; t < threads; ++t) team.emplace_back(work);
  } catch (const std::system_error&) {  // the threads that could start do all the work
  }
  work();
  for (std::thread& thread : team) thread.join();
#endif
  if (error) std::rethrow_exception(error);
}

}  // namespace natten
