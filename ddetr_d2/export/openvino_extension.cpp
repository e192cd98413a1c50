// Multi-scale deformable attention for OpenVINO, see attention_call.h: reads the operator from ONNX
// files and runs it.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <openvino/core/parallel.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/openvino.hpp>
#include <vector>

#include "attention_call.h"

namespace ddetr_d2 {
namespace {

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
    AttentionCall call(value, spatial_shapes, locations, inputs[3].get_shape());
    if (!call.is_valid()) return false;
    outputs[0].set_shape({value[0], locations[1], value[2] * value[3]});
    call.set_data(inputs[0].data(), inputs[2].data(), inputs[3].data(), outputs[0].data());
    ov::parallel_nt(0, [&](int thread, int threads) { call.run(thread, threads); });
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
