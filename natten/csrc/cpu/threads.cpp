// What the library keeps per process and per thread: the functions of PyTorch's OpenMP runtime, or a pool of threads, and
// the scratch of each thread.
//
// The library is linked against no OpenMP runtime, since a second one in a process would compete with PyTorch's for the
// cores. Calling the runtime's functions by address also works with compilers that have no OpenMP.
#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <type_traits>

#include "export.h"
#include "parallel.h"
#include "scratch.h"

#if defined(_WIN32)
#if !defined(NOMINMAX)
#define NOMINMAX
#endif
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#endif

namespace natten {

namespace {

using Body = void (*)(void*);

// ---------------------------------------------------------------------------------------------------------------------
// OpenMP
// ---------------------------------------------------------------------------------------------------------------------

// GOMP_parallel exists in GCC's runtime, and in those of LLVM and Intel except on Windows. The others exist in the latter.
struct Ident {  // the place in the source code, for tools
  int32_t reserved_1, flags, reserved_2, reserved_3;
  const char* source;
};
using Microtask = void (*)(int32_t* thread, int32_t* member, ...);
void (*gomp_parallel)(Body, void* data, unsigned threads, unsigned flags) = nullptr;
void (*kmpc_fork_call)(const Ident*, int32_t arguments, Microtask, ...) = nullptr;
void (*kmpc_push_num_threads)(const Ident*, int32_t thread, int32_t threads) = nullptr;
int32_t (*kmpc_global_thread_num)(const Ident*) = nullptr;

const Ident ident = {0, 2, 0, 0, ";natten;natten;0;0;;"};  // 2: by a compiler

void call_body(int32_t*, int32_t*, void* body, void* data) { reinterpret_cast<Body>(body)(data); }

// ---------------------------------------------------------------------------------------------------------------------
// The pool
// ---------------------------------------------------------------------------------------------------------------------

// Threads that wait between calls. Their number grows to what a call asks for.
class Pool {
 public:
  void run(Body body, void* data, int threads) {
    const std::unique_lock<std::mutex> turn(in_use_, std::try_to_lock);
    if (!turn) return body(data);  // another thread uses the pool, so this one works alone
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      grow(threads - 1);
      body_ = body, data_ = data;
      running_ = vacant_ = std::min(threads - 1, size_);
    }
    wake_.notify_all();
    body(data);
    std::unique_lock<std::mutex> lock(mutex_);
    running_ -= vacant_, vacant_ = 0;  // nothing is left for those who have not started
    done_.wait(lock, [&] { return running_ == 0; });
  }

 private:
  std::mutex in_use_, mutex_;
  std::condition_variable wake_, done_;
  int size_ = 0, vacant_ = 0, running_ = 0;  // threads; places in the team; members that work, or will
  Body body_ = nullptr;
  void* data_ = nullptr;

  void grow(int size) {
    try {
      for (; size_ < size; ++size_) std::thread([this] { work(); }).detach();
    } catch (const std::system_error&) {  // the threads that could start do all the work
    }
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return vacant_ > 0; });
      --vacant_;
      const Body body = body_;
      void* const data = data_;
      lock.unlock();
      body(data);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }
};

Pool& pool() {
  static Pool* const pool = new Pool;  // never deleted, because its threads run until the process ends
  return *pool;
}

}  // namespace

void run_team(Body body, void* data, int threads) {
  if (gomp_parallel) return gomp_parallel(body, data, threads, 0);
  if (!kmpc_fork_call) return pool().run(body, data, threads);
  kmpc_push_num_threads(&ident, kmpc_global_thread_num(&ident), threads);
  kmpc_fork_call(&ident, 2, reinterpret_cast<Microtask>(call_body), reinterpret_cast<void*>(body), data);
}

// ---------------------------------------------------------------------------------------------------------------------
// Scratch
// ---------------------------------------------------------------------------------------------------------------------

#if defined(_WIN32)

// A thread_local Scratch, compiled by MinGW's GCC 12, crashes in its destructor when a thread ends under wine. Therefore
// Windows keeps a pointer per thread, and deletes the scratch.
Scratch& thread_scratch() {
  static const DWORD slot = FlsAlloc([](void* scratch) { delete static_cast<Scratch*>(scratch); });
  if (slot == FLS_OUT_OF_INDEXES) throw std::bad_alloc();
  Scratch* scratch = static_cast<Scratch*>(FlsGetValue(slot));
  if (!scratch) {
    scratch = new Scratch;
    FlsSetValue(slot, scratch);
  }
  scratch->reset();
  return *scratch;
}

#else

Scratch& thread_scratch() {
  thread_local Scratch scratch;
  scratch.reset();
  return scratch;
}

#endif

}  // namespace natten

// Makes the library use an OpenMP runtime. Functions that the runtime does not have are null. Must be called before the
// first call on several threads.
NATTEN_EXPORT void natten_use_openmp(void* gomp_parallel, void* kmpc_fork_call, void* kmpc_push_num_threads,
                                     void* kmpc_global_thread_num) {
  const auto set = [](auto& function, void* address) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(address);
  };
  set(natten::gomp_parallel, gomp_parallel);
  if (!kmpc_push_num_threads || !kmpc_global_thread_num) kmpc_fork_call = nullptr;
  set(natten::kmpc_fork_call, kmpc_fork_call);
  set(natten::kmpc_push_num_threads, kmpc_push_num_threads);
  set(natten::kmpc_global_thread_num, kmpc_global_thread_num);
}
