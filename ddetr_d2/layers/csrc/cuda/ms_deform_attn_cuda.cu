#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <array>
#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>

#include "../check.h"
#include "../tensors.h"
#include "kernels.cuh"

namespace ddetr_d2 {
namespace {

// Contiguous, and at an address that 16 bytes can be read from at once: that of a part of a larger
// tensor need not be one.
Tensor aligned(const Tensor& tensor, ScalarType type) {
  const Tensor result = contiguous(tensor, type);
  const auto address = reinterpret_cast<uintptr_t>(result.const_data_ptr());
  return address % 16 == 0 ? result : torch::stable::clone(result);
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// The checked and contiguous arguments of a call, and how the kernels are to run.
struct Inputs {
  Sizes sizes;  // checked before the device is chosen, so that the checks' errors come first
  torch::stable::accelerator::DeviceGuard guard;
  Tensor value, locations, weights;
  Levels levels{};
  CudaCall call{};
  int vector;  // numbers of value that a thread reads at once
  cudaStream_t stream;

  Inputs(const Tensor& value_, IntArrayRef spatial_shapes, const Tensor& sampling_locations,
         const Tensor& attention_weights)
      : sizes(check_inputs(value_, spatial_shapes, sampling_locations, attention_weights)),
        guard(value_.get_device_index()),
        value(aligned(value_, value_.scalar_type())),
        locations(aligned(sampling_locations,
                          common_type(value_, sampling_locations, attention_weights))),
        weights(contiguous(attention_weights, locations.scalar_type())),
        stream(current_stream(value_)) {
    check_offsets(sizes);
    if (sizes.levels > kMaxLevels) {
      raise_value_error("spatial_shapes: expected at most ", kMaxLevels, " levels on a GPU, got ",
                        sizes.levels);
    }
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
    int multiprocessors = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                          value_.get_device_index()));
    set_forward_bits(call, static_cast<int>(value.element_size()), multiprocessors);
  }

  unsigned blocks_of_forward() const {
    const int64_t blocks = forward_blocks(call, kThreads);
    if (blocks > std::numeric_limits<int32_t>::max()) {
      raise_value_error("sampling_locations: too many queries for a GPU, N * Q = ",
                        sizes.batch * sizes.queries);
    }
    return static_cast<unsigned>(blocks);
  }
};

// Calls run with one value of value's type, of the type of sums and of that of the locations, and
// with the vector's length as a type.
template <typename scalar_t, typename location_t, typename Run>
void dispatch_vector(const Inputs& inputs, Run run) {
  using acc_t = std::conditional_t<sizeof(scalar_t) == 8, double, float>;
  constexpr int wide = 16 / sizeof(scalar_t);
  if (inputs.vector == wide) {
    return run(scalar_t{}, acc_t{}, location_t{}, std::integral_constant<int, wide>{});
  }
  if constexpr (sizeof(scalar_t) == 2) {
    if (inputs.vector == wide / 2) {
      return run(scalar_t{}, acc_t{}, location_t{}, std::integral_constant<int, wide / 2>{});
    }
  }
  run(scalar_t{}, acc_t{}, location_t{}, std::integral_constant<int, 1>{});
}

template <typename scalar_t, typename Run>
void dispatch_type(const Inputs& inputs, Run run) {
  if constexpr (sizeof(scalar_t) == 2) {
    if (inputs.locations.scalar_type() == ScalarType::Float) {
      return dispatch_vector<scalar_t, float>(inputs, run);
    }
  }
  dispatch_vector<scalar_t, scalar_t>(inputs, run);
}

template <typename Run>
void dispatch(const Inputs& inputs, Run run) {
  switch (inputs.value.scalar_type()) {
    case ScalarType::Double:
      return dispatch_type<double>(inputs, run);
    case ScalarType::Half:
      return dispatch_type<c10::Half>(inputs, run);
    case ScalarType::BFloat16:
      return dispatch_type<c10::BFloat16>(inputs, run);
    default:
      return dispatch_type<float>(inputs, run);
  }
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// `reference` has points (N, Q, L, 2) or boxes (N, Q, L, 4) that the inputs' locations are offsets
// from, its weights then being numbers before the softmax; or is null.
template <int kReference>
Tensor forward(const Inputs& inputs, const Tensor& like, const Tensor* reference) {
  const Sizes& sizes = inputs.sizes;
  const std::array<int64_t, 3> shape{sizes.batch, sizes.queries, sizes.heads * sizes.channels};
  Tensor output = empty(shape, like.scalar_type(), like);
  if (output.numel() == 0) return output;
  dispatch(inputs, [&](auto scalar, auto acc, auto location, auto vector) {
    using scalar_t = decltype(scalar);
    using acc_t = decltype(acc);
    using location_t = decltype(location);
    forward_kernel<scalar_t, acc_t, location_t, decltype(vector)::value, kReference>
        <<<inputs.blocks_of_forward(), kThreads, 0, inputs.stream>>>(
            inputs.call, inputs.levels, data<scalar_t>(inputs.value),
            reference == nullptr ? nullptr : data<acc_t>(*reference),
            data<location_t>(inputs.locations), data<location_t>(inputs.weights),
            mutable_data<scalar_t>(output));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

Tensor ms_deform_attn_cuda(const Tensor& value, IntArrayRef spatial_shapes,
                           const Tensor& sampling_locations, const Tensor& attention_weights) {
  const Inputs inputs(value, spatial_shapes, sampling_locations, attention_weights);
  return forward<0>(inputs, value, nullptr);
}

Tensor ms_deform_attn_fused_cuda(const Tensor& value, IntArrayRef spatial_shapes,
                                 const Tensor& reference_points, const Tensor& sampling_offsets,
                                 const Tensor& attention_logits) {
  const Inputs inputs(value, spatial_shapes, sampling_offsets, attention_logits);
  check_reference_points(reference_points, value, inputs.sizes);
  const Tensor reference = contiguous(reference_points, accumulation_type(value.scalar_type()));
  return reference.size(3) == 2 ? forward<2>(inputs, value, &reference)
                                : forward<4>(inputs, value, &reference);
}

// `deterministic` leaves most of the GPU idle, but fixes the order of all sums.
std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward_cuda(
    const Tensor& grad_output, const Tensor& value, IntArrayRef spatial_shapes,
    const Tensor& sampling_locations, const Tensor& attention_weights, bool deterministic) {
  const Inputs inputs(value, spatial_shapes, sampling_locations, attention_weights);
  const Sizes& sizes = inputs.sizes;
  check_grad_output(grad_output, value, sizes);
  const ScalarType type = value.scalar_type();
  const Tensor grad_outputs = aligned(grad_output, type);
  // Sums of 16 bit numbers are made in float.
  const Tensor grad_value = zeros(inputs.value.sizes(), accumulation_type(type), value);
  const bool is_empty = grad_outputs.numel() == 0;  // then no kernel writes to these two
  const auto make = is_empty ? zeros : empty;
  const ScalarType location_type = inputs.locations.scalar_type();
  const Tensor grad_locations = make(inputs.locations.sizes(), location_type, value);
  const Tensor grad_weights = make(inputs.weights.sizes(), location_type, value);
  const int64_t items = sizes.batch * sizes.heads * (deterministic ? sizes.levels : sizes.queries);
  if (!is_empty) {
    dispatch(inputs, [&](auto scalar, auto acc, auto location, auto vector) {
      using scalar_t = decltype(scalar);
      using acc_t = decltype(acc);
      using location_t = decltype(location);
      constexpr int kVector = decltype(vector)::value;
      const auto kernel = deterministic
                              ? backward_kernel<scalar_t, acc_t, location_t, kVector, true>
                              : backward_kernel<scalar_t, acc_t, location_t, kVector, false>;
      kernel<<<backward_blocks(items, inputs.call.group, kThreads), kThreads, 0, inputs.stream>>>(
          inputs.call, inputs.levels, data<scalar_t>(grad_outputs), data<scalar_t>(inputs.value),
          data<location_t>(inputs.locations), data<location_t>(inputs.weights),
          mutable_data<acc_t>(grad_value), mutable_data<location_t>(grad_locations),
          mutable_data<location_t>(grad_weights));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  return {to_type(grad_value, type), to_type(grad_locations, sampling_locations.scalar_type()),
          to_type(grad_weights, attention_weights.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ddetr_d2, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn_cuda));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&ms_deform_attn_fused_cuda));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward_cuda));
}

}  // namespace ddetr_d2
