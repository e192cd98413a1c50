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

// The widest vectors that this processor has and that the channels fill. As in PyTorch's own
// kernels, the environment variable ATEN_CPU_CAPABILITY can ask for less.
Kernels choose_kernels(const Call& call, Type value, Type locations) {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  static const bool has_avx512 = capability.rfind("AVX512", 0) == 0;
  if (has_avx512 && call.channels % 16 == 0) return avx512::find_kernels(value, locations);
  if (has_avx512 || capability == "AVX2") return avx2::find_kernels(value, locations);
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

// Runs the forward kernel over all queries.
at::Tensor run_forward(const Inputs& inputs, Call call) {
  at::Tensor output =
      at::empty({call.batch, call.queries, call.heads * call.channels}, inputs.value.options());
  call.output = output.mutable_data_ptr();
  const int64_t samples = std::max<int64_t>(1, call.heads * call.levels * call.points);
  at::parallel_for(0, call.batch * call.queries, std::max<int64_t>(1, kSamplesPerTask / samples),
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

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef spatial_shapes,
    const at::Tensor& sampling_locations, const at::Tensor& attention_weights) {
  Inputs inputs(value, spatial_shapes, sampling_locations, attention_weights);
  Call& call = inputs.call;
  check_grad_output(grad_output, value, inputs.sizes);
  const at::Tensor grad_outputs = grad_output.contiguous();
  const auto layout = at::MemoryFormat::Contiguous;
  at::Tensor grad_value = at::zeros_like(inputs.value, layout);
  at::Tensor grad_locations = at::empty_like(inputs.locations, layout);
  at::Tensor grad_weights = at::empty_like(inputs.weights, layout);
  call.grad_output = grad_outputs.const_data_ptr();
  call.grad_value = grad_value.mutable_data_ptr();
  call.grad_locations = grad_locations.mutable_data_ptr();
  call.grad_weights = grad_weights.mutable_data_ptr();
  // Heads of images can be too few parts for the threads. And 16 bit types need a buffer for each
  // thread, which is to be small beside the gradients: the largest levels come first, one after the
  // other in the same thread.
  const int64_t heads = call.batch * call.heads;
  const bool by_level = heads < at::get_num_threads() || value.scalar_type() != accumulation_type(value);
  at::parallel_for(0, heads * (by_level ? call.levels : 1), 1, [&](int64_t begin, int64_t end) {
    inputs.kernels.backward(call, begin, end, by_level);
  });
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
