// A library that calls the CPU kernels at the path NATTEN_KERNELS, and then makes the mistake that NATTEN_FAULT names. The
// tests check that the harness finds each of them.
#include <dlfcn.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>

#include "plan.h"

namespace {

using Kernel = int (*)(const natten::Plan*, void* const*, const float*, float*, int);

int calls = 0;

// Calls a kernel of which `output` is an output.
int run(const char* name, natten::TensorName output, const natten::Plan* plan, void* const* tensors, const float* rpb,
        float* grad_rpb, int threads) {
  const std::string fault = std::getenv("NATTEN_FAULT");
  void* library = dlopen(std::getenv("NATTEN_KERNELS"), RTLD_NOW);
  if (!library) return 3;
  const int status = reinterpret_cast<Kernel>(dlsym(library, name))(plan, tensors, rpb, grad_rpb, threads);
  char* const data = static_cast<char*>(tensors[output]);
  ++calls;
  if (fault == "wrong value" && plan->dtype == natten::FLOAT32) {
    float& x = *reinterpret_cast<float*>(data);
    x = std::isfinite(x) ? x + 1 : 0;  // logits before the map are infinite
  }
  if (fault == "missing value") std::memset(data, 0xff, plan->dtype == natten::FLOAT32 ? 4 : 2);
  if (fault == "written outside") data[-1] = 0;
  if (fault == "overwritten input") {
    const int input = tensors[natten::VALUE] ? natten::VALUE : natten::KEY;
    static_cast<char*>(tensors[input])[0] ^= 1;
  }
  if (fault == "not deterministic" && calls % 2) data[0] ^= 1;
  return fault == "failure" ? 1 : status;
}

}  // namespace

#define FAULTY(op, output)                                                                                            \
  extern "C" __attribute__((visibility("default"))) int natten_##op(                                                  \
      const natten::Plan* plan, void* const* tensors, const float* rpb, float* grad_rpb, int threads) {               \
    return run("natten_" #op, natten::output, plan, tensors, rpb, grad_rpb, threads);                                 \
  }

FAULTY(attention, OUT)
FAULTY(attention_backward, GRAD_KEY)
FAULTY(query_key, ATTN)
FAULTY(query_key_backward, GRAD_QUERY)
FAULTY(weight_value, OUT)
FAULTY(weight_value_backward, GRAD_ATTN)
