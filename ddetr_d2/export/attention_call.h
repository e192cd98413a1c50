// What the extensions of all runtimes share: the operator MSDeformAttn of the domain ddetr_d2, run
// by the kernels of the compiled operator, in float32.
//
// Inputs: value (N, S, M, D), height and width of each level (L, 2) of int64, locations
// (N, Q, M, L, K, 2) and weights (N, Q, M, L, K). Output: (N, Q, M * D).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/choose_kernels.h"

namespace ddetr_d2 {

constexpr const char* kDomain = "ddetr_d2";
constexpr const char* kName = "MSDeformAttn";

class AttentionCall {
 public:
  // Takes the shapes of the inputs and the heights and widths of the levels, which have to stay
  // where they are. Call is_valid() before anything else.
  template <typename Shape>
  AttentionCall(const Shape& value, const std::vector<int64_t>& spatial_shapes,
                const Shape& locations, const Shape& weights) {
    if (value.size() != 4 || locations.size() != 6 || weights.size() != 5) return;
    call_.batch = value[0];
    call_.tokens = value[1];
    call_.heads = value[2];
    call_.channels = value[3];
    call_.queries = locations[1];
    call_.levels = locations[3];
    call_.points = locations[4];
    call_.spatial_shapes = spatial_shapes.data();
    // The kernels trust what they are told.
    int64_t tokens = 0;
    for (size_t i = 0; i + 1 < spatial_shapes.size(); i += 2) {
      tokens += spatial_shapes[i] * spatial_shapes[i + 1];
    }
    valid_ = static_cast<int64_t>(spatial_shapes.size()) == 2 * call_.levels &&
             tokens == call_.tokens && locations[0] == value[0] && locations[2] == value[2] &&
             locations[5] == 2 && std::equal(weights.begin(), weights.end(), locations.begin());
  }

  // Whether the shapes go together.
  bool is_valid() const { return valid_; }

  // Rows of the output: those of all queries for the first head of the first image, those for the
  // second head, and so on.
  int64_t rows() const { return call_.batch * call_.heads * call_.queries; }

  int64_t samples() const { return rows() * call_.levels * call_.points; }

  void set_data(const void* value, const void* locations, const void* weights, void* output) {
    call_.value = value;
    call_.locations = locations;
    call_.weights = weights;
    call_.output = output;
    kernels_ = choose_kernels(call_.channels, Type::kFloat, Type::kFloat);
  }

  // Computes part number `part` of `parts` equal ones.
  void run(int64_t part, int64_t parts) const {
    const int64_t begin = rows() * part / parts, end = rows() * (part + 1) / parts;
    if (begin < end) kernels_.forward(call_, begin, end);
  }

 private:
  Call call_{};
  Kernels kernels_{};
  bool valid_ = false;
};

}  // namespace ddetr_d2
