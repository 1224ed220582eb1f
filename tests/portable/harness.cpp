// Runs a compiled library of the CPU kernels on recorded problems and compares the results, without Python or PyTorch.
//
//   harness PROBLEMS [OPENMP] KERNELS
//
// PROBLEMS is written by recorder.py, which describes its format. KERNELS is the library to test, and OPENMP the runtime
// whose threads it uses instead of its own. All paths must be as the system's loader expects them.
//
// Inputs are laid out with the recorded strides between NaNs, and outputs are NaN before a call. After it, outputs must be
// within their tolerances, nothing else may have changed, and a call on several threads must give the same bits again.
//
// Prints a line per failing case, and a table of the largest errors. Exit status: 0 if no case fails, 1 if one does, 2 if
// the files cannot be used.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#undef OUT  // a macro there, and a tensor in plan.h
#else
#include <dlfcn.h>
#endif

#include "plan.h"

namespace {

using natten::Plan;

// ---------------------------------------------------------------------------------------------------------------------
// Problems
// ---------------------------------------------------------------------------------------------------------------------

constexpr const char* DTYPE_NAMES[] = {"float32", "bfloat16", "float16"};

double decode(const char* data, int64_t dtype) {
  if (dtype == natten::FLOAT32) {
    float x;
    std::memcpy(&x, data, sizeof x);
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, data, sizeof bits);
  if (dtype == natten::BFLOAT16) {
    const uint32_t wide = uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
  }
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                           : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                          : std::ldexp(mantissa, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

struct Tensor {
  std::string name;
  bool is_output;
  int64_t dtype, offset;  // of the first element, from an aligned address
  std::vector<int64_t> sizes, strides;
  double tolerance, rounding;      // of outputs: the largest error, and the size of one rounding
  std::vector<char> values;        // of inputs, contiguous
  std::vector<double> expected;    // of outputs, contiguous

  int64_t item_size() const { return dtype == natten::FLOAT32 ? 4 : 2; }

  // The position of each element relative to the aligned address, in the order of the contiguous tensor.
  std::vector<int64_t> positions() const {
    std::vector<int64_t> all{offset};
    for (size_t dim = 0; dim < sizes.size(); ++dim) {
      std::vector<int64_t> next;
      next.reserve(all.size() * sizes[dim]);
      for (const int64_t position : all)
        for (int64_t i = 0; i < sizes[dim]; ++i) next.push_back(position + i * strides[dim]);
      all.swap(next);
    }
    return all;
  }
};

struct Case {
  std::string name, op;
  int64_t dtype, threads;
  double scale;
  std::vector<natten::Axis> axes;
  std::vector<Tensor> tensors;

  const Tensor* find(const std::string& wanted) const {
    for (const Tensor& tensor : tensors)
      if (tensor.name == wanted) return &tensor;
    return nullptr;
  }
};

class Reader {
 public:
  explicit Reader(const char* path) : file_(path, std::ios::binary) {
    char magic[8] = {};
    file_.read(magic, sizeof magic);
    if (!file_ || std::memcmp(magic, "NATTEN01", sizeof magic)) throw std::runtime_error(std::string(path) + " contains no problems");
  }

  bool is_at_end() { return file_.peek() == std::ifstream::traits_type::eof(); }

  Case next() {
    Case result;
    result.name = text(), result.op = text();
    result.dtype = read<int64_t>(), result.threads = read<int64_t>(), result.scale = read<double>();
    result.axes.resize(read<int64_t>());
    for (natten::Axis& axis : result.axes) {
      axis.length = read<int64_t>(), axis.kernel_size = read<int64_t>(), axis.stride = read<int64_t>();
      axis.dilation = read<int64_t>(), axis.is_causal = read<int64_t>();
    }
    result.tensors.resize(read<int64_t>());
    for (Tensor& tensor : result.tensors) read_tensor(tensor);
    return result;
  }

 private:
  std::ifstream file_;

  template <class T>
  T read() {
    T value;
    read_all(&value, 1);
    return value;
  }

  template <class T>
  void read_all(T* to, size_t count) {
    file_.read(reinterpret_cast<char*>(to), static_cast<std::streamsize>(count * sizeof(T)));
    if (!file_) throw std::runtime_error("the file of problems ends too early");
  }

  std::string text() {
    std::string result(read<int64_t>(), ' ');
    read_all(result.data(), result.size());
    return result;
  }

  void read_tensor(Tensor& tensor) {
    tensor.name = text();
    tensor.is_output = read<int64_t>(), tensor.dtype = read<int64_t>(), tensor.offset = read<int64_t>();
    tensor.tolerance = read<double>(), tensor.rounding = read<double>();
    const int64_t dims = read<int64_t>();
    tensor.sizes.resize(dims), tensor.strides.resize(dims);
    read_all(tensor.sizes.data(), dims), read_all(tensor.strides.data(), dims);
    int64_t count = 1;
    for (const int64_t size : tensor.sizes) count *= size;
    if (tensor.is_output) {
      tensor.expected.resize(count);
      read_all(tensor.expected.data(), count);
    } else {
      tensor.values.resize(count * tensor.item_size());
      read_all(tensor.values.data(), tensor.values.size());
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The interface of the kernels: all that this program knows about plan.h and the arguments of the functions
// ---------------------------------------------------------------------------------------------------------------------

using Kernel = int (*)(const Plan*, void* const*, const float*, float*, int);

const std::pair<const char*, int> TENSOR_NAMES[] = {
    {"QUERY", natten::QUERY},           {"KEY", natten::KEY},
    {"VALUE", natten::VALUE},           {"OUT", natten::OUT},
    {"LSE", natten::LSE},               {"ATTN", natten::ATTN},
    {"GRAD_OUT", natten::GRAD_OUT},     {"GRAD_LSE", natten::GRAD_LSE},
    {"GRAD_ATTN", natten::GRAD_ATTN},   {"GRAD_QUERY", natten::GRAD_QUERY},
    {"GRAD_KEY", natten::GRAD_KEY},     {"GRAD_VALUE", natten::GRAD_VALUE},
};
static_assert(sizeof TENSOR_NAMES / sizeof *TENSOR_NAMES == natten::TENSORS, "one name per tensor of plan.h");

Plan make_plan(const Case& c) {
  const int missing = 3 - static_cast<int>(c.axes.size()), heads_dim = static_cast<int>(c.axes.size()) + 1;
  const Tensor *query = c.find("QUERY"), *key = c.find("KEY"), *value = c.find("VALUE");
  const Tensor& shaped = query ? *query : *value;
  Plan plan = {};
  plan.dtype = c.dtype;
  plan.batch = shaped.sizes[0];
  plan.heads = shaped.sizes[heads_dim];
  plan.kv_heads = (key ? *key : shaped).sizes[heads_dim];
  plan.dim = shaped.sizes.back();
  plan.value_dim = (value ? *value : shaped).sizes.back();
  for (int i = 0; i < 3; ++i) plan.axis[i] = i < missing ? natten::Axis{1, 1, 1, 1, 0} : c.axes[i - missing];
  plan.scale = c.scale;
  for (const auto& [name, index] : TENSOR_NAMES) {
    const Tensor* tensor = c.find(name);
    if (!tensor) continue;
    natten::Strides& strides = plan.strides[index];
    strides.batch = tensor->strides[0];
    for (int i = missing; i < 3; ++i) strides.axis[i] = tensor->strides[1 + i - missing];
    strides.head = tensor->strides[heads_dim];
  }
  return plan;
}

int call(Kernel kernel, const Plan& plan, const Case& c, const std::map<std::string, char*>& addresses) {
  const auto address = [&](const char* name) {
    const auto found = addresses.find(name);
    return found == addresses.end() ? nullptr : found->second;
  };
  void* tensors[natten::TENSORS] = {};
  for (const auto& [name, index] : TENSOR_NAMES) tensors[index] = address(name);
  return kernel(&plan, tensors, reinterpret_cast<const float*>(address("RPB")),
                reinterpret_cast<float*>(address("GRAD_RPB")), static_cast<int>(c.threads));
}

// ---------------------------------------------------------------------------------------------------------------------
// Libraries
// ---------------------------------------------------------------------------------------------------------------------

class Library {
 public:
#if defined(_WIN32)
  explicit Library(const char* path) : handle_(LoadLibraryA(path)) {
    if (!handle_) throw std::runtime_error(std::string(path) + " cannot be loaded: error " + std::to_string(GetLastError()));
  }
  void* find(const std::string& name) const { return reinterpret_cast<void*>(GetProcAddress(handle_, name.c_str())); }

 private:
  HMODULE handle_;
#else
  explicit Library(const char* path) : handle_(dlopen(path, RTLD_NOW | RTLD_GLOBAL)) {
    if (!handle_) throw std::runtime_error(dlerror());
  }
  void* find(const std::string& name) const { return dlsym(handle_, name.c_str()); }

 private:
  void* handle_;
#endif

 public:
  Kernel kernel(const std::string& op) const {
    void* function = find("natten_" + op);
    if (!function) throw std::runtime_error("the library does not export natten_" + op);
    return reinterpret_cast<Kernel>(function);
  }

  void use_openmp(const Library& runtime) const {
    using Function = void (*)(void*, void*, void*, void*);
    void *parallel = runtime.find("GOMP_parallel"), *fork = runtime.find("__kmpc_fork_call");
    if (!parallel && !fork) throw std::runtime_error("the OpenMP runtime has no function that starts threads");
    if (void* function = find("natten_use_openmp"))
      reinterpret_cast<Function>(function)(parallel, fork, runtime.find("__kmpc_push_num_threads"),
                                           runtime.find("__kmpc_global_thread_num"));
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Running and comparing
// ---------------------------------------------------------------------------------------------------------------------

constexpr int64_t GUARD = 64, ALIGNMENT = 64;  // elements around a tensor, and bytes
constexpr char UNTOUCHED = '\xff';             // NaN in every dtype

// A tensor in memory, laid out as recorded.
class Buffer {
 public:
  explicit Buffer(const Tensor& tensor) : tensor_(tensor), positions_(tensor.positions()) {
    int64_t last = tensor.offset;
    for (const int64_t position : positions_) last = std::max(last, position);
    bytes_.assign((last + 1 + 2 * GUARD) * tensor.item_size() + ALIGNMENT, UNTOUCHED);
    const uintptr_t first = reinterpret_cast<uintptr_t>(bytes_.data()) + GUARD * tensor.item_size();
    base_ = bytes_.data() + GUARD * tensor.item_size() + (ALIGNMENT - first % ALIGNMENT) % ALIGNMENT;
    if (!tensor.is_output)
      for (size_t i = 0; i < positions_.size(); ++i)
        std::memcpy(element(i), &tensor.values[i * tensor.item_size()], tensor.item_size());
    before_ = bytes_;
  }

  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  const Tensor& tensor() const { return tensor_; }
  char* address() { return base_ + tensor_.offset * tensor_.item_size(); }
  double value(size_t i) const { return decode(element(i), tensor_.dtype); }
  const std::vector<char>& bytes() const { return bytes_; }
  void reset() { bytes_ = before_; }  // of the same size, so that addresses stay

  // Whether anything but the elements of an output has changed.
  bool is_overwritten() const {
    std::vector<char> found = bytes_;
    if (tensor_.is_output)
      for (size_t i = 0; i < positions_.size(); ++i)
        std::memset(&found[element(i) - bytes_.data()], UNTOUCHED, tensor_.item_size());
    return found != before_;
  }

  std::string index(size_t i) const {
    std::string text;
    for (size_t dim = tensor_.sizes.size(); dim-- > 0; i /= tensor_.sizes[dim])
      text = std::to_string(i % tensor_.sizes[dim]) + (text.empty() ? "" : ",") + text;
    return tensor_.name + "[" + text + "]";
  }

 private:
  const Tensor& tensor_;
  std::vector<int64_t> positions_;
  std::vector<char> bytes_, before_;
  char* base_;

  char* element(size_t i) const { return base_ + positions_[i] * tensor_.item_size(); }
};

struct Errors {
  int64_t cases = 0;
  double largest = 0, roundings = 0, share = 0;  // share of the tolerance
};

// Returns what is wrong with an output; empty if nothing is.
std::string compare(const Buffer& buffer, Errors& errors) {
  const Tensor& tensor = buffer.tensor();
  size_t wrong = 0, worst = 0;
  double largest = -1;
  for (size_t i = 0; i < tensor.expected.size(); ++i) {
    const double found = buffer.value(i), expected = tensor.expected[i];
    double error = std::isfinite(expected) ? std::fabs(found - expected) : found == expected ? 0 : INFINITY;
    if (std::isnan(error)) error = INFINITY;
    if (error > largest) largest = error, worst = i;
    wrong += !(error <= tensor.tolerance);
  }
  if (largest < 0) return "";
  errors.largest = std::max(errors.largest, largest);
  errors.roundings = std::max(errors.roundings, largest / tensor.rounding);
  errors.share = std::max(errors.share, largest / tensor.tolerance);
  if (!wrong) return "";
  std::ostringstream text;
  text << buffer.index(worst) << " is " << buffer.value(worst) << ", expected " << tensor.expected[worst] << " +- "
       << tensor.tolerance << "; " << wrong << " of " << tensor.expected.size() << " elements are wrong";
  return text.str();
}

// Runs a case. Returns what is wrong; empty if nothing is.
std::string run(const Case& c, const Library& library, Errors& errors) {
  const Plan plan = make_plan(c);
  const Kernel kernel = library.kernel(c.op);
  std::vector<std::unique_ptr<Buffer>> buffers;
  std::map<std::string, char*> addresses;
  for (const Tensor& tensor : c.tensors) {
    buffers.push_back(std::make_unique<Buffer>(tensor));
    addresses[tensor.name] = buffers.back()->address();
  }
  ++errors.cases;
  std::vector<std::vector<char>> results;
  for (int turn = 0; turn < (c.threads > 1 ? 2 : 1); ++turn) {
    for (const auto& buffer : buffers) buffer->reset();
    if (const int status = call(kernel, plan, c, addresses)) return "returns " + std::to_string(status);
    for (size_t i = 0; i < buffers.size(); ++i) {
      if (buffers[i]->is_overwritten()) return "memory around or in " + c.tensors[i].name + " is overwritten";
      if (turn == 0) results.push_back(buffers[i]->bytes());
      else if (results[i] != buffers[i]->bytes()) return c.tensors[i].name + " differs when it is computed again";
    }
  }
  std::string wrong;
  for (const auto& buffer : buffers) {
    if (!buffer->tensor().is_output) continue;
    const std::string text = compare(*buffer, errors);
    if (!text.empty()) wrong += (wrong.empty() ? "" : "; ") + text;
  }
  return wrong;
}

int run_all(const char* problems, const Library& library) {
  const auto started = std::chrono::steady_clock::now();
  Reader reader(problems);
  std::map<std::pair<std::string, std::string>, Errors> table;
  int64_t cases = 0, failed = 0;
  for (; !reader.is_at_end(); ++cases) {
    const Case c = reader.next();
    const char* dtype = DTYPE_NAMES[c.dtype];
    const std::string wrong = run(c, library, table[{c.op, dtype}]);
    if (wrong.empty()) continue;
    ++failed;
    std::printf("FAILED %s, %s, %s: %s\n", c.name.c_str(), c.op.c_str(), dtype, wrong.c_str());
    std::fflush(stdout);
  }
  std::printf("%-22s %-9s %5s  %s\n", "operator", "dtype", "cases", "largest error: absolute, in roundings, of the tolerance");
  for (const auto& [key, errors] : table)
    std::printf("%-22s %-9s %5lld  %.2e  %.2f  %.0f%%\n", key.first.c_str(), key.second.c_str(),
                static_cast<long long>(errors.cases), errors.largest, errors.roundings, 100 * errors.share);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
  std::printf("%lld cases, %lld failed, %.1f s\n", static_cast<long long>(cases), static_cast<long long>(failed),
              seconds.count());
  return failed ? 1 : 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3 || count > 4) {
    std::fprintf(stderr, "usage: %s PROBLEMS [OPENMP] KERNELS\n", arguments[0]);
    return 2;
  }
  try {
    const Library kernels(arguments[count - 1]);
    if (count == 4) kernels.use_openmp(Library(arguments[2]));
    return run_all(arguments[1], kernels);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
