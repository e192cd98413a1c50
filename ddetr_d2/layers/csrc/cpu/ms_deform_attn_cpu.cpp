#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "../check.h"
#include "kernels.h"

namespace ddetr_d2 {
namespace {

// Samples below which one more thread costs more than it saves.
constexpr int64_t kSamplesPerTask = 2048;

Type type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Type::kDouble;
    case at::kHalf:
      return Type::kHalf;
    case at::kBFloat16:
      return Type::kBFloat16;
    default:
      return Type::kFloat;
  }
}

// The widest vectors that this processor has and that the channels fill, those of 16 bit types in
// pairs. As in PyTorch's own kernels, the environment variable ATEN_CPU_CAPABILITY can ask for
// less.
Kernels choose_kernels(const Call& call, Type value, Type locations) {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  static const bool has_avx512 = capability.rfind("AVX512", 0) == 0;
  const bool is_narrow = value == Type::kHalf || value == Type::kBFloat16;
  if (has_avx512 && call.channels % (is_narrow ? 32 : 16) == 0) {
    return avx512::find_kernels(value, locations);
  }
  if ((has_avx512 || capability == "AVX2") && !(is_narrow && call.channels % 16 != 0)) {
    return avx2::find_kernels(value, locations);
  }
#endif
  return baseline::find_kernels(value, locations);
}

struct Inputs {
  at::Tensor value, locations, weights;
  at::IntArrayRef spatial_shapes;
  Sizes sizes;
  Call call{};
  Kernels kernels;

  Inputs(const at::Tensor& value_, at::IntArrayRef spatial_shapes_,
         const at::Tensor& sampling_locations, const at::Tensor& attention_weights)
      : spatial_shapes(spatial_shapes_) {
    sizes = check_inputs(value_, spatial_shapes, sampling_locations, attention_weights);
    check_offsets(sizes);
    const auto type = common_type(value_, sampling_locations, attention_weights);
    value = value_.contiguous();
    locations = sampling_locations.to(type).contiguous();
    weights = attention_weights.to(type).contiguous();
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
    kernels = choose_kernels(call, type_of(value), type_of(locations));
  }
};

// Runs the forward kernel over all rows of the output.
at::Tensor run_forward(const Inputs& inputs, Call call) {
  at::Tensor output =
      at::empty({call.batch, call.queries, call.heads * call.channels}, inputs.value.options());
  call.output = output.mutable_data_ptr();
  const int64_t samples = std::max<int64_t>(1, call.levels * call.points);
  at::parallel_for(0, call.batch * call.heads * call.queries, kSamplesPerTask / samples + 1,
                   [&](int64_t begin, int64_t end) { inputs.kernels.forward(call, begin, end); });
  return output;
}

at::Tensor ms_deform_attn_cpu(const at::Tensor& value, at::IntArrayRef spatial_shapes,
                              const at::Tensor& sampling_locations,
                              const at::Tensor& attention_weights) {
  const Inputs inputs(value, spatial_shapes, sampling_locations, attention_weights);
  return run_forward(inputs, inputs.call);
}

at::Tensor ms_deform_attn_fused_cpu(const at::Tensor& value, at::IntArrayRef spatial_shapes,
                                    const at::Tensor& reference_points,
                                    const at::Tensor& sampling_offsets,
                                    const at::Tensor& attention_logits) {
  const Inputs inputs(value, spatial_shapes, sampling_offsets, attention_logits);
  check_reference_points(reference_points, value, inputs.sizes);
  const at::Tensor reference = reference_points.to(accumulation_type(value)).contiguous();
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
  const int64_t per_thread =
      (heads * call.levels + at::get_num_threads() - 1) / at::get_num_threads();
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
  call.by_level = call.copied || is_narrow || heads < at::get_num_threads();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef spatial_shapes,
    const at::Tensor& sampling_locations, const at::Tensor& attention_weights) {
  Inputs inputs(value, spatial_shapes, sampling_locations, attention_weights);
  Call& call = inputs.call;
  check_grad_output(grad_output, value, inputs.sizes);
  const at::Tensor grad_outputs = grad_output.contiguous();
  const auto layout = at::MemoryFormat::Contiguous;
  const int64_t gradient_bytes = static_cast<int64_t>(
      inputs.value.nbytes() + inputs.locations.nbytes() + inputs.weights.nbytes());
  divide_backward(call, value.element_size(), value.scalar_type() != accumulation_type(value),
                  gradient_bytes);
  at::Tensor grad_value =
      call.copied ? at::empty_like(inputs.value, layout) : at::zeros_like(inputs.value, layout);
  at::Tensor grad_locations = at::empty_like(inputs.locations, layout);
  at::Tensor grad_weights = at::empty_like(inputs.weights, layout);
  call.grad_output = grad_outputs.const_data_ptr();
  call.grad_value = grad_value.mutable_data_ptr();
  call.grad_locations = grad_locations.mutable_data_ptr();
  call.grad_weights = grad_weights.mutable_data_ptr();
  const int64_t parts = call.batch * call.heads * (call.by_level ? call.levels : 1);
  at::parallel_for(0, parts, 1,
                   [&](int64_t begin, int64_t end) { inputs.kernels.backward(call, begin, end); });
  return {grad_value, grad_locations.to(sampling_locations.scalar_type()),
          grad_weights.to(attention_weights.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(ddetr_d2, CPU, m) {
  m.impl("ms_deform_attn", TORCH_FN(ms_deform_attn_cpu));
  m.impl("ms_deform_attn_fused", TORCH_FN(ms_deform_attn_fused_cpu));
  m.impl("ms_deform_attn_backward", TORCH_FN(ms_deform_attn_backward_cpu));
}

}  // namespace ddetr_d2
