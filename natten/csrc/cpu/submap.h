// Windows, and the submaps into which dilation divides a problem. natten/geometry is the same definition in Python.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "convert.h"
#include "plan.h"

namespace natten {

// Keys of each query along one axis of a residue class.
struct Windows {
  int n = -1;                // tokens of the class
  std::vector<int> first;    // first key
  std::vector<int> end;      // one past the last
  std::vector<int> missing;  // slots of a causal window before the map

  void make(const Axis& axis, int tokens) {
    if (n == tokens) return;
    n = tokens;
    first.resize(n), end.resize(n), missing.resize(n);
    const int k = axis.kernel_size, stride = axis.stride;
    for (int s = 0; s < n; ++s) {
      const int group = s - s % stride;
      if (axis.is_causal) {
        const int start = std::min(group + stride - 1, n - 1) - (k - 1);
        first[s] = std::max(start, 0);
        end[s] = s + 1;
        missing[s] = first[s] - start;
      } else {
        const int leader = std::min(group + stride / 2, n - 1);
        first[s] = std::min(std::max(leader - k / 2, 0), n - k);
        end[s] = first[s] + k;
        missing[s] = 0;
      }
    }
  }
};

struct Token {
  int z, y, x;
};

// A tensor in a submap: its first token, and the distances between tokens in bytes.
struct View {
  char* base = nullptr;
  int64_t step[3] = {};

  char* at(const Token& t) const { return base + t.z * step[0] + t.y * step[1] + t.x * step[2]; }
};

// All tokens of one image and residue class: a small problem without dilation.
struct Submap {
  const Call* call;
  int64_t batch, residue[3];
  int n[3];

  Submap(const Call& c, int64_t batch_, int64_t residues) : call(&c), batch(batch_) {
    for (int i = 2; i >= 0; --i) {
      const Axis& axis = c.plan->axis[i];
      residue[i] = residues % axis.dilation;
      residues /= axis.dilation;
      n[i] = static_cast<int>((axis.length - residue[i] + axis.dilation - 1) / axis.dilation);
    }
  }

  // A head of a tensor whose elements have `size` bytes.
  View view(TensorName name, int64_t head, int size) const {
    const Plan& plan = *call->plan;
    const Strides& strides = plan.strides[name];
    View view;
    int64_t offset = batch * strides.batch + head * strides.head;
    for (int i = 0; i < 3; ++i) {
      offset += residue[i] * strides.axis[i];
      view.step[i] = plan.axis[i].dilation * strides.axis[i] * size;
    }
    view.base = static_cast<char*>(call->tensors[name]) + offset * size;
    return view;
  }
};

}  // namespace natten
