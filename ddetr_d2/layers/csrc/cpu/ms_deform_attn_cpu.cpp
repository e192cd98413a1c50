#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "../check.h"
#include "../tensors.h"
#include "choose_kernels.h"
#include "kernels.h"

namespace ddetr_d2 {
namespace {

// Samples below which one more thread costs more than it saves.
constexpr int64_t kSamplesPerTask = 2048;

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Type::kDouble;
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    default:
      return Type::kFloat;
  }
}

struct Inputs {
  Tensor value, locations, weights;
  Sizes sizes;
  Call call{};
  Kernels kernels;

  Inputs(const Tensor& value_, IntArrayRef spatial_shapes, const Tensor& sampling_locations,
         const Tensor& attention_weights)
      : Inputs(check_inputs(value_, spatial_shapes, sampling_locations, attention_weights), value_,
               spatial_shapes, sampling_locations, attention_weights,
               common_type(value_, sampling_locations, attention_weights)) {}

 private:
  Inputs(const Sizes& sizes, const Tensor& value_, IntArrayRef spatial_shapes,
         const Tensor& sampling_locations, const Tensor& attention_weights, ScalarType type)
      : value(contiguous(value_, value_.scalar_type())),
        locations(contiguous(sampling_locations, type)),
        weights(contiguous(attention_weights, type)),
        sizes(sizes) {
    check_offsets(sizes);
    call.batch = sizes.batch;
    call.tokens = sizes.tokens;
    call.heads = sizes.heads;
    call.channels = sizes.channels;
    call.queries = sizes.queries;
    call.levels = sizes.levels;
    call.points = sizes.points;
    call.spatial_shapes = spatial_shapes.data();
    call.value = value.const_data_ptr();
    call.locations = locations.const_data_ptr();
    call.weights = weights.const_data_ptr();
    kernels = choose_kernels(call.channels, type_of(value), type_of(locations));
  }
};

// Runs the forward kernel over all rows of the output.
Tensor run_forward(const Inputs& inputs, Call call) {
  const std::array<int64_t, 3> sizes{call.batch, call.queries, call.heads * call.channels};
  Tensor output = empty(sizes, inputs.value.scalar_type(), inputs.value);
  call.output = output.mutable_data_ptr();
  const int64_t samples = std::max<int64_t>(1, call.levels * call.points);
  torch::stable::parallel_for(
      0, call.batch * call.heads * call.queries, kSamplesPerTask / samples + 1,
      [&](int64_t begin, int64_t end) { inputs.kernels.forward(call, begin, end); });
  return output;
}

Tensor ms_deform_attn_cpu(const Tensor& value, IntArrayRef spatial_shapes,
                          const Tensor& sampling_locations, const Tensor& attention_weights) {
  const Inputs inputs(value, spatial_shapes, sampling_locations, attention_weights);
  return run_forward(inputs, inputs.call);
}

Tensor ms_deform_attn_fused_cpu(const Tensor& value, IntArrayRef spatial_shapes,
                                const Tensor& reference_points, const Tensor& sampling_offsets,
                                const Tensor& attention_logits) {
  const Inputs inputs(value, spatial_shapes, sampling_offsets, attention_logits);
  check_reference_points(reference_points, value, inputs.sizes);
  const Tensor reference = contiguous(reference_points, accumulation_type(value.scalar_type()));
  Call call = inputs.call;
  call.reference = reference.const_data_ptr();
  call.reference_size = reference.size(3);
  return run_forward(inputs, call);
}

// Chooses the parts of the backward pass and their buffers. As in the forward pass it is faster to
// have the pixels of a head side by side, but all buffers together are to be small beside the
// gradients.
void divide_backward(Call& call, int64_t element_size, bool is_narrow, int64_t gradient_bytes) {
  // The largest levels come first, so that they do not all have their buffers at the same time.
  const int64_t heads = call.batch * call.heads;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t per_thread = (heads * call.levels + threads - 1) / threads;
  int64_t tokens = 0;
  for (int64_t begin = 0; begin < heads * call.levels; begin += per_thread) {
    const int64_t end = std::min(begin + per_thread, heads * call.levels);
    int64_t largest = 0;
    for (int64_t l = begin / heads; l <= (end - 1) / heads; ++l) {
      largest = std::max(largest, call.spatial_shapes[2 * l] * call.spatial_shapes[2 * l + 1]);
    }
    tokens += largest;
  }
  const int64_t sum_size = std::max<int64_t>(element_size, sizeof(float));
  const int64_t buffers = tokens * call.channels * (element_size + sum_size);
  call.copied =
      buffers * 10 <= gradient_bytes && call.queries * call.levels * call.points > call.tokens;
  call.by_level = call.copied || is_narrow || heads < threads;
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward_cpu(
    const Tensor& grad_output, const Tensor& value, IntArrayRef spatial_shapes,
    const Tensor& sampling_locations, const Tensor& attention_weights,
    [[maybe_unused]] bool deterministic) {  // always so here
  Inputs inputs(value, spatial_shapes, sampling_locations, attention_weights);
  Call& call = inputs.call;
  check_grad_output(grad_output, value, inputs.sizes);
  const ScalarType type = value.scalar_type();
  const Tensor grad_outputs = contiguous(grad_output, type);
  const int64_t gradient_bytes =
      bytes(inputs.value) + bytes(inputs.locations) + bytes(inputs.weights);
  divide_backward(call, static_cast<int64_t>(value.element_size()), type != accumulation_type(type),
                  gradient_bytes);
  const auto like = [&](const Tensor& tensor) {
    return empty(tensor.sizes(), tensor.scalar_type(), tensor);
  };
  Tensor grad_value = like(inputs.value);
  if (!call.copied) torch::stable::zero_(grad_value);
  Tensor grad_locations = like(inputs.locations);
  Tensor grad_weights = like(inputs.weights);
  call.grad_output = grad_outputs.const_data_ptr();
  call.grad_value = grad_value.mutable_data_ptr();
  call.grad_locations = grad_locations.mutable_data_ptr();
  call.grad_weights = grad_weights.mutable_data_ptr();
  const int64_t parts = call.batch * call.heads * (call.by_level ? call.levels : 1);
  torch::stable::parallel_for(
      0, parts, 1, [&](int64_t begin, int64_t end) { inputs.kernels.backward(call, begin, end); });
  return {grad_value, to_type(grad_locations, sampling_locations.scalar_type()),
          to_type(grad_weights, attention_weights.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ddetr_d2, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn_cpu));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&ms_deform_attn_fused_cpu));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward_cpu));
}

}  // namespace ddetr_d2
