// Multi-scale deformable attention for onnxruntime, see attention_call.h: a library of custom
// operators, for SessionOptions.register_custom_ops_library.
#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "attention_call.h"
#include "onnxruntime_abi.h"

namespace ddetr_d2 {
namespace {

using namespace onnxruntime;

// Samples below which one more thread costs more than it saves, and the most parts of a call.
constexpr int64_t kSamplesPerPart = 2048;
constexpr int64_t kMostParts = 128;

struct Input {
  std::vector<int64_t> shape;
  void* data;
};

// Reads an input; anything but null is an error of onnxruntime's.
Status* read(const Api& api, const Context* context, size_t index, Input& input) {
  const Value* tensor = nullptr;
  TensorInfo* info = nullptr;
  size_t axes = 0;
  if (auto* error = api.input(context, index, &tensor)) return error;
  if (auto* error = api.data(tensor, &input.data)) return error;
  if (auto* error = api.create_info(tensor, &info)) return error;
  auto* error = api.axes(info, &axes);
  if (error == nullptr) {
    input.shape.resize(axes);
    error = api.shape(info, input.shape.data(), axes);
  }
  api.release_info(info);
  return error;
}

Status* compute(void* kernel, Context* context) {
  const Api& api = *static_cast<const Api*>(kernel);
  std::array<Input, 4> inputs;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (auto* error = read(api, context, i, inputs[i])) return error;
  }
  const auto& [value, levels, locations, weights] = inputs;
  int64_t numbers = 1;
  for (const int64_t length : levels.shape) numbers *= length;
  const auto* first = static_cast<const int64_t*>(levels.data);
  const std::vector<int64_t> spatial_shapes(first, first + numbers);
  AttentionCall call(value.shape, spatial_shapes, locations.shape, weights.shape);
  if (!call.is_valid()) {
    return api.create_status(kInvalidArgument, "MSDeformAttn: shapes do not go together");
  }
  const std::array<int64_t, 3> shape{value.shape[0], locations.shape[1],
                                     value.shape[2] * value.shape[3]};
  Value* tensor = nullptr;
  void* output = nullptr;
  if (auto* error = api.output(context, 0, shape.data(), shape.size(), &tensor)) return error;
  if (auto* error = api.data(tensor, &output)) return error;
  call.set_data(value.data, locations.data, weights.data, output);

  struct Work {
    const AttentionCall& call;
    int64_t parts;
  } work{call, std::clamp<int64_t>(call.samples() / kSamplesPerPart, 1, kMostParts)};
  const auto run = [](void* data, size_t part) {
    const auto& work = *static_cast<const Work*>(data);
    work.call.run(static_cast<int64_t>(part), work.parts);
  };
  return api.parallel_for(context, run, work.parts, &work);
}

Operator describe() {
  Operator op{};
  op.version = kVersion;
  op.name = [](const Operator*) { return kName; };
  op.execution_provider = [](const Operator*) -> const char* { return nullptr; };
  op.inputs = [](const Operator*) -> size_t { return 4; };
  op.input_type = [](const Operator*, size_t index) { return index == 1 ? kInt64 : kFloat32; };
  op.outputs = [](const Operator*) -> size_t { return 1; };
  op.output_type = [](const Operator*, size_t) { return kFloat32; };
  op.input_characteristic = [](const Operator*, size_t) { return kRequired; };
  op.output_characteristic = [](const Operator*, size_t) { return kRequired; };
  op.input_memory = [](const Operator*, size_t) { return kDefaultMemory; };
  // A kernel has nothing of its own to keep.
  op.create_kernel = [](const Operator*, const Api* api, const KernelInfo*,
                        void** kernel) -> Status* {
    *kernel = const_cast<Api*>(api);
    return nullptr;
  };
  op.destroy_kernel = [](void*) {};
  op.compute = compute;
  return op;
}

}  // namespace
}  // namespace ddetr_d2

// The name and the arguments are onnxruntime's.
extern "C" __attribute__((visibility("default"))) ddetr_d2::onnxruntime::Status* RegisterCustomOps(
    ddetr_d2::onnxruntime::SessionOptions* options,
    const ddetr_d2::onnxruntime::ApiBase* base) {
  using namespace ddetr_d2;
  const onnxruntime::Api* api = base->get_api(onnxruntime::kVersion);
  if (api == nullptr) {
    return base->get_api(1)->create_status(
        onnxruntime::kInvalidArgument, "libraries of ddetr_d2 need onnxruntime 1.17 or newer");
  }
  static const onnxruntime::Operator op = describe();
  // Kept until the process ends, as the operator is: sessions hold no copy of it.
  onnxruntime::Domain* domain = nullptr;
  if (auto* error = api->create_domain(kDomain, &domain)) return error;
  if (auto* error = api->add_operator(domain, &op)) return error;
  return api->add_domain(options, domain);
}
