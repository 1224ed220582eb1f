// A mock of the driver library with the functions that natten/backends/cuda/driver.py calls. Prints one line per call.
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static uintptr_t current;
static int has_failed;

static int load_module(uintptr_t* module, const char* image) {
  *module = 0x30;
  return !printf("load %.3s\n", image + 1);
}
static int find_function(uintptr_t* function, uintptr_t module, const char* name) {
  *function = 0x50;
  return !printf("function %s of %#lx\n", name, (unsigned long)module);
}
static int set_attribute(uintptr_t function, int attribute, int value) {
  return !printf("attribute %d of %#lx = %d\n", attribute, (unsigned long)function, value);
}
static int find_device(int* device, int ordinal) { return *device = ordinal, 0; }
static int retain_context(uintptr_t* context, int device) { return *context = 0xc0 + device, 0; }
static int get_context(uintptr_t* context) { return *context = current, 0; }
static int push_context(uintptr_t context) { return current = context, !printf("push %#lx\n", (unsigned long)context); }
static int pop_context(uintptr_t* context) { return *context = current, current = 0, !printf("pop\n"); }
static int error_string(int error, const char** text) { return *text = error == 700 ? "an illegal address" : "?", 0; }

// Fails for 77 blocks.
static int launch(uintptr_t function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                  unsigned threads_z, unsigned shared_bytes, uintptr_t stream, void** parameters, void** extra) {
  const int64_t* words = parameters[0];
  printf("launch %#lx %u %u %u %u %u %u %u %#lx: %lld %lld%s\n", (unsigned long)function, x, y, z, threads, threads_y,
         threads_z, shared_bytes, (unsigned long)stream, (long long)words[0], (long long)words[1], extra ? " extra" : "");
  has_failed |= x == 77;
  return x == 77 ? 700 : 0;
}
static int version(int* number) { return *number = 13000, 0; }

// The first query finds that the stream is still busy; after a failed launch, every query fails.
static int query(uintptr_t stream) {
  static int queries;
  printf("query %#lx\n", (unsigned long)stream);
  return has_failed ? 700 : queries++ == 0 ? 600 : 0;
}

int cuGetProcAddress_v2(const char* name, void** function, int number, uint64_t flags, int* status) {
  static const struct {
    const char* name;
    void* function;
  } functions[] = {
      {"cuDriverGetVersion", version},
      {"cuDeviceGet", find_device},
      {"cuDevicePrimaryCtxRetain", retain_context},
      {"cuCtxGetCurrent", get_context},
      {"cuCtxPushCurrent", push_context},
      {"cuCtxPopCurrent", pop_context},
      {"cuModuleLoadData", load_module},
      {"cuModuleGetFunction", find_function},
      {"cuFuncSetAttribute", set_attribute},
      {"cuGetErrorString", error_string},
      {"cuLaunchKernel", launch},
      {"cuStreamQuery", query},
      {"cuGetProcAddress", cuGetProcAddress_v2},
  };
  setvbuf(stdout, NULL, _IOLBF, 0);  // keeps the order with the output of Python
  for (unsigned i = 0; i < sizeof functions / sizeof *functions; ++i)
    if (!strcmp(functions[i].name, name)) return *function = functions[i].function, status ? *status = 0 : 0;
  return *function = NULL, status ? *status = 1 : 0, 500;
}
