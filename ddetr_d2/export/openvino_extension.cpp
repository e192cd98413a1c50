// Multi-scale deformable attention for OpenVINO: reads the operator MSDeformAttn of the domain
// ddetr_d2 from ONNX files and runs it by the kernels of the compiled operator, in float32.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <openvino/core/parallel.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/openvino.hpp>
#include <vector>

#include "cpu/kernels.h"

namespace ddetr_d2 {
namespace {

constexpr const char* kDomain = "ddetr_d2";
constexpr const char* kName = "MSDeformAttn";

// The widest vectors that this processor has and that the channels of a head fill.
Kernels choose_kernels(int64_t channels) {
#if defined(__x86_64__)
  if (channels % 16 == 0 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq")) {
    return avx512::find_kernels(Type::kFloat, Type::kFloat);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return avx2::find_kernels(Type::kFloat, Type::kFloat);
  }
#endif
  return baseline::find_kernels(Type::kFloat, Type::kFloat);
}

// OpenVINO may have replaced integers of 64 bits by some of 32.
std::vector<int64_t> integers(const ov::Tensor& tensor) {
  std::vector<int64_t> result(tensor.get_size());
  if (tensor.get_element_type() == ov::element::i32) {
    std::copy_n(tensor.data<int32_t>(), result.size(), result.begin());
  } else {
    std::copy_n(tensor.data<int64_t>(), result.size(), result.begin());
  }
  return result;
}

// Inputs: value (N, S, M, D), height and width of each level (L, 2), locations
// (N, Q, M, L, K, 2) and weights (N, Q, M, L, K). Output: (N, Q, M * D).
class MSDeformAttn : public ov::op::Op {
 public:
  OPENVINO_OP("MSDeformAttn", "ddetr_d2");

  MSDeformAttn() = default;
  explicit MSDeformAttn(const ov::OutputVector& inputs) : Op(inputs) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    const auto& value = get_input_partial_shape(0);
    const auto& locations = get_input_partial_shape(2);
    NODE_VALIDATION_CHECK(this, value.rank() == 4 && locations.rank() == 6,
                          "value or locations have the wrong number of axes");
    for (const size_t index : {0, 2, 3}) {
      NODE_VALIDATION_CHECK(this, get_input_element_type(index) == ov::element::f32,
                            "value, locations and weights must be of float32");
    }
    set_output_type(0, ov::element::f32, {value[0], locations[1], value[2] * value[3]});
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<MSDeformAttn>(inputs);
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const ov::Shape value = inputs[0].get_shape();
    const ov::Shape locations = inputs[2].get_shape();
    const std::vector<int64_t> spatial_shapes = integers(inputs[1]);
    Call call{};
    call.batch = value[0];
    call.tokens = value[1];
    call.heads = value[2];
    call.channels = value[3];
    call.queries = locations[1];
    call.levels = locations[3];
    call.points = locations[4];
    // The kernels trust what they are told.
    int64_t tokens = 0;
    for (size_t i = 0; i + 1 < spatial_shapes.size(); i += 2) {
      tokens += spatial_shapes[i] * spatial_shapes[i + 1];
    }
    const ov::Shape weights{locations.begin(), locations.end() - 1};
    if (spatial_shapes.size() != 2 * locations[3] || tokens != call.tokens ||
        locations[0] != value[0] || locations[2] != value[2] || locations[5] != 2 ||
        inputs[3].get_shape() != weights) {
      return false;
    }
    call.spatial_shapes = spatial_shapes.data();
    call.value = inputs[0].data();
    call.locations = inputs[2].data();
    call.weights = inputs[3].data();
    outputs[0].set_shape({value[0], locations[1], value[2] * value[3]});
    call.output = outputs[0].data();
    const Kernels kernels = choose_kernels(call.channels);
    const int64_t rows = call.batch * call.heads * call.queries;
    ov::parallel_nt(0, [&](int thread, int threads) {
      int64_t begin = 0, end = 0;
      ov::splitter(rows, threads, thread, begin, end);
      if (begin < end) kernels.forward(call, begin, end);
    });
    return true;
  }
};

ov::OutputVector convert(const ov::frontend::NodeContext& node) {
  ov::OutputVector inputs;
  for (size_t i = 0; i < node.get_input_size(); ++i) {
    inputs.push_back(node.get_input(static_cast<int>(i)));
  }
  return std::make_shared<MSDeformAttn>(inputs)->outputs();
}

}  // namespace
}  // namespace ddetr_d2

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({
    std::make_shared<ov::OpExtension<ddetr_d2::MSDeformAttn>>(),
    std::make_shared<ov::frontend::onnx::ConversionExtension>(ddetr_d2::kName, ddetr_d2::kDomain,
                                                              ddetr_d2::convert),
}));
