#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../bilinear.h"
#include "../check.h"

namespace ddetr_d2 {
namespace {

// Samples below which one more thread costs more than it saves.
constexpr int64_t kSamplesPerTask = 2048;

// All tensors are contiguous and of one type.
template <typename scalar_t>
void forward_kernel(const Sizes& sizes, const scalar_t* value, at::IntArrayRef spatial_shapes,
                    const scalar_t* locations, const scalar_t* weights, scalar_t* output) {
  const int64_t stride = sizes.heads * sizes.channels;
  const int64_t samples = sizes.levels * sizes.points;
  const int64_t grain = std::max<int64_t>(1, kSamplesPerTask / std::max<int64_t>(1, samples));
  // One item is one head of one query: its outputs are its own.
  at::parallel_for(
      0, sizes.batch * sizes.queries * sizes.heads, grain, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t head = item % sizes.heads;
          const int64_t batch = item / sizes.heads / sizes.queries;
          const scalar_t* level = value + batch * sizes.tokens * stride + head * sizes.channels;
          const scalar_t* location = locations + item * samples * 2;
          const scalar_t* weight = weights + item * samples;
          scalar_t* out = output + item * sizes.channels;
          std::fill_n(out, sizes.channels, scalar_t(0));
          for (int64_t l = 0; l < sizes.levels; ++l) {
            const int64_t height = spatial_shapes[2 * l];
            const int64_t width = spatial_shapes[2 * l + 1];
            for (int64_t k = 0; k < sizes.points; ++k, location += 2, ++weight) {
              Corner<scalar_t> corners[4];
              if (find_corners(location[0], location[1], height, width, corners)) {
                sample_forward(level, stride, corners, *weight, sizes.channels, out);
              }
            }
            level += height * width * stride;
          }
        }
      });
}

// All tensors are contiguous and of one type, and the gradients are zero at first.
template <typename scalar_t>
void backward_kernel(const Sizes& sizes, const scalar_t* grad_output, const scalar_t* value,
                     at::IntArrayRef spatial_shapes, const scalar_t* locations,
                     const scalar_t* weights, scalar_t* grad_value, scalar_t* grad_locations,
                     scalar_t* grad_weights) {
  const int64_t stride = sizes.heads * sizes.channels;
  const int64_t samples = sizes.levels * sizes.points;
  // One item is one head of one image with all its queries, in order: no other thread adds to the
  // same part of grad_value, so the sums do not depend on the number of threads.
  at::parallel_for(0, sizes.batch * sizes.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item % sizes.heads;
      const int64_t batch = item / sizes.heads;
      for (int64_t query = 0; query < sizes.queries; ++query) {
        const int64_t row = (batch * sizes.queries + query) * sizes.heads + head;
        const scalar_t* grad_out = grad_output + row * sizes.channels;
        int64_t offset = batch * sizes.tokens * stride + head * sizes.channels;
        int64_t sample = row * samples;
        for (int64_t l = 0; l < sizes.levels; ++l) {
          const int64_t height = spatial_shapes[2 * l];
          const int64_t width = spatial_shapes[2 * l + 1];
          for (int64_t k = 0; k < sizes.points; ++k, ++sample) {
            Corner<scalar_t> corners[4];
            if (!find_corners(locations[2 * sample], locations[2 * sample + 1], height, width,
                              corners)) {
              continue;
            }
            SampleGrad<scalar_t> grad;
            sample_backward(
                value + offset, grad_value + offset, stride, corners, weights[sample],
                sizes.channels, grad_out, [](scalar_t* to, scalar_t amount) { *to += amount; },
                grad);
            grad_locations[2 * sample] = grad.x;
            grad_locations[2 * sample + 1] = grad.y;
            grad_weights[sample] = grad.attention;
          }
          offset += height * width * stride;
        }
      }
    }
  });
}

// The kernels are compiled for float and double; 16 bit types are computed in float.
at::Tensor prepare(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.to(type).contiguous();
}

at::Tensor ms_deform_attn_cpu(const at::Tensor& value, at::IntArrayRef spatial_shapes,
                              const at::Tensor& sampling_locations,
                              const at::Tensor& attention_weights) {
  const Sizes sizes = check_inputs(value, spatial_shapes, sampling_locations, attention_weights);
  const auto type = accumulation_type(value);
  const at::Tensor values = prepare(value, type);
  const at::Tensor locations = prepare(sampling_locations, type);
  const at::Tensor weights = prepare(attention_weights, type);
  at::Tensor output =
      at::empty({sizes.batch, sizes.queries, sizes.heads * sizes.channels}, values.options());
  AT_DISPATCH_FLOATING_TYPES(type, "ms_deform_attn_cpu", [&] {
    forward_kernel(sizes, values.const_data_ptr<scalar_t>(), spatial_shapes,
                   locations.const_data_ptr<scalar_t>(), weights.const_data_ptr<scalar_t>(),
                   output.mutable_data_ptr<scalar_t>());
  });
  return output.to(value.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef spatial_shapes,
    const at::Tensor& sampling_locations, const at::Tensor& attention_weights) {
  const Sizes sizes = check_inputs(value, spatial_shapes, sampling_locations, attention_weights);
  check_grad_output(grad_output, value, sizes);
  const auto type = accumulation_type(value);
  const at::Tensor grad_outputs = prepare(grad_output, type);
  const at::Tensor values = prepare(value, type);
  const at::Tensor locations = prepare(sampling_locations, type);
  const at::Tensor weights = prepare(attention_weights, type);
  at::Tensor grad_value = at::zeros(values.sizes(), values.options());
  at::Tensor grad_locations = at::zeros(locations.sizes(), locations.options());
  at::Tensor grad_weights = at::zeros(weights.sizes(), weights.options());
  AT_DISPATCH_FLOATING_TYPES(type, "ms_deform_attn_backward_cpu", [&] {
    backward_kernel(
        sizes, grad_outputs.const_data_ptr<scalar_t>(), values.const_data_ptr<scalar_t>(),
        spatial_shapes, locations.const_data_ptr<scalar_t>(), weights.const_data_ptr<scalar_t>(),
        grad_value.mutable_data_ptr<scalar_t>(), grad_locations.mutable_data_ptr<scalar_t>(),
        grad_weights.mutable_data_ptr<scalar_t>());
  });
  return {grad_value.to(value.scalar_type()), grad_locations.to(sampling_locations.scalar_type()),
          grad_weights.to(attention_weights.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(ddetr_d2, CPU, m) {
  m.impl("ms_deform_attn", TORCH_FN(ms_deform_attn_cpu));
  m.impl("ms_deform_attn_backward", TORCH_FN(ms_deform_attn_backward_cpu));
}

}  // namespace ddetr_d2
