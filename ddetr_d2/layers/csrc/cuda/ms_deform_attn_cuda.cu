#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdint>
#include <tuple>

#include "../check.h"
#include "kernels.cuh"

namespace ddetr_d2 {
namespace {

// Contiguous, and at an address that 16 bytes can be read from at once: that of a part of a larger
// tensor need not be one.
at::Tensor aligned(const at::Tensor& tensor) {
  const at::Tensor contiguous = tensor.contiguous();
  const auto address = reinterpret_cast<uintptr_t>(contiguous.const_data_ptr());
  return address % 16 == 0 ? contiguous : contiguous.clone();
}

// The checked and contiguous arguments of a call, and how the kernels are to run.
struct Inputs {
  c10::cuda::CUDAGuard guard;
  Sizes sizes;
  at::Tensor value, locations, weights;
  Levels levels{};
  CudaCall call{};
  int vector;  // numbers of value in 16 bytes, 1 where the channels cannot be split so

  Inputs(const at::Tensor& value_, at::IntArrayRef spatial_shapes,
         const at::Tensor& sampling_locations, const at::Tensor& attention_weights)
      : guard(value_.device()),
        sizes(check_inputs(value_, spatial_shapes, sampling_locations, attention_weights)) {
    check_offsets(sizes);
    TORCH_CHECK_VALUE(sizes.levels <= kMaxLevels,
                      "ms_deform_attn: spatial_shapes: expected at most ", kMaxLevels,
                      " levels on a GPU, got ", sizes.levels);
    const auto type = common_type(value_, sampling_locations, attention_weights);
    value = aligned(value_);
    locations = aligned(sampling_locations.to(type));
    weights = attention_weights.to(type).contiguous();
    int32_t first_token = 0;
    for (int64_t l = 0; l < sizes.levels; ++l) {
      levels.rows[l] = static_cast<int32_t>(spatial_shapes[2 * l]);
      levels.columns[l] = static_cast<int32_t>(spatial_shapes[2 * l + 1]);
      levels.first_token[l] = first_token;
      first_token += levels.rows[l] * levels.columns[l];
    }
    vector = vector_for(sizes.channels, static_cast<int>(value.element_size()));
    call = {sizes.batch,
            sizes.tokens,
            static_cast<int32_t>(sizes.heads),
            static_cast<int32_t>(sizes.channels),
            static_cast<int32_t>(sizes.queries),
            static_cast<int32_t>(sizes.levels),
            static_cast<int32_t>(sizes.points),
            group_for(sizes.channels, vector)};
  }

  unsigned blocks(int64_t items) const { return blocks_for(items, call.group, kThreads); }
};

// Calls run with one value of each type, and the vector's length as a type, that `inputs` needs.
template <typename Run>
void dispatch(const Inputs& inputs, Run run) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, inputs.value.scalar_type(), "ms_deform_attn", [&] {
        using acc_t = at::opmath_type<scalar_t>;
        constexpr int wide = 16 / sizeof(scalar_t);
        const bool narrow = inputs.locations.scalar_type() == inputs.value.scalar_type();
        if (narrow && inputs.vector == wide) {
          run(scalar_t{}, acc_t{}, scalar_t{}, std::integral_constant<int, wide>{});
        } else if (narrow) {
          run(scalar_t{}, acc_t{}, scalar_t{}, std::integral_constant<int, 1>{});
        } else if (inputs.vector == wide) {
          run(scalar_t{}, acc_t{}, acc_t{}, std::integral_constant<int, wide>{});
        } else {
          run(scalar_t{}, acc_t{}, acc_t{}, std::integral_constant<int, 1>{});
        }
      });
}

at::Tensor ms_deform_attn_cuda(const at::Tensor& value, at::IntArrayRef spatial_shapes,
                               const at::Tensor& sampling_locations,
                               const at::Tensor& attention_weights) {
  const Inputs inputs(value, spatial_shapes, sampling_locations, attention_weights);
  const Sizes& sizes = inputs.sizes;
  at::Tensor output =
      at::empty({sizes.batch, sizes.queries, sizes.heads * sizes.channels}, value.options());
  if (output.numel() == 0) return output;
  dispatch(inputs, [&](auto scalar, auto acc, auto location, auto vector) {
    using scalar_t = decltype(scalar);
    using location_t = decltype(location);
    forward_kernel<scalar_t, decltype(acc), location_t, decltype(vector)::value>
        <<<inputs.blocks(sizes.batch * sizes.queries * sizes.heads), kThreads, 0,
           c10::cuda::getCurrentCUDAStream()>>>(
            inputs.call, inputs.levels, inputs.value.const_data_ptr<scalar_t>(),
            inputs.locations.const_data_ptr<location_t>(),
            inputs.weights.const_data_ptr<location_t>(), output.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cuda(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef spatial_shapes,
    const at::Tensor& sampling_locations, const at::Tensor& attention_weights) {
  const Inputs inputs(value, spatial_shapes, sampling_locations, attention_weights);
  const Sizes& sizes = inputs.sizes;
  check_grad_output(grad_output, value, sizes);
  const at::Tensor grad_outputs = aligned(grad_output);
  // Sums of 16 bit numbers are made in float.
  at::Tensor grad_value =
      at::zeros(inputs.value.sizes(), value.options().dtype(accumulation_type(value)));
  const bool is_empty = grad_outputs.numel() == 0;  // then no kernel writes to these two
  at::Tensor grad_locations =
      is_empty ? at::zeros_like(inputs.locations) : at::empty_like(inputs.locations);
  at::Tensor grad_weights =
      is_empty ? at::zeros_like(inputs.weights) : at::empty_like(inputs.weights);
  // Slow, since it leaves most of the GPU idle, but the order of all sums is fixed.
  const bool in_order = at::globalContext().deterministicAlgorithms();
  const int64_t items = sizes.batch * sizes.heads * (in_order ? sizes.levels : sizes.queries);
  if (!is_empty) {
    dispatch(inputs, [&](auto scalar, auto acc, auto location, auto vector) {
      using scalar_t = decltype(scalar);
      using acc_t = decltype(acc);
      using location_t = decltype(location);
      backward_kernel<scalar_t, acc_t, location_t, decltype(vector)::value>
          <<<inputs.blocks(items), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
              inputs.call, inputs.levels, in_order, grad_outputs.const_data_ptr<scalar_t>(),
              inputs.value.const_data_ptr<scalar_t>(),
              inputs.locations.const_data_ptr<location_t>(),
              inputs.weights.const_data_ptr<location_t>(), grad_value.mutable_data_ptr<acc_t>(),
              grad_locations.mutable_data_ptr<location_t>(),
              grad_weights.mutable_data_ptr<location_t>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  return {grad_value.to(value.scalar_type()), grad_locations.to(sampling_locations.scalar_type()),
          grad_weights.to(attention_weights.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(ddetr_d2, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_FN(ms_deform_attn_cuda));
  m.impl("ms_deform_attn_backward", TORCH_FN(ms_deform_attn_backward_cuda));
}

}  // namespace ddetr_d2
