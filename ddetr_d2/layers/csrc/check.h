// What is checked before a kernel touches memory. The same checks stand in layers/checks.py for
// the routes that do not come through here.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>

namespace ddetr_d2 {

// Sizes of the call: names as in the documentation of ddetr_d2.layers.ms_deform_attn.
struct Sizes {
  int64_t batch, tokens, heads, channels, queries, levels, points;
};

// Locations and weights are converted to this type: sums of 16 bit values are made in float.
inline at::ScalarType accumulation_type(const at::Tensor& value) {
  return value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_like_value(const char* name, const at::Tensor& tensor, const at::Tensor& value,
                             bool or_accumulation_type) {
  TORCH_CHECK_VALUE(tensor.device() == value.device(), "ms_deform_attn: ", name,
                    ": expected device ", value.device(), " as value has, got ", tensor.device());
  TORCH_CHECK_VALUE(
      tensor.scalar_type() == value.scalar_type() ||
          (or_accumulation_type && tensor.scalar_type() == accumulation_type(value)),
      "ms_deform_attn: ", name, ": expected type ", value.scalar_type(), " as value has",
      or_accumulation_type && value.scalar_type() != accumulation_type(value) ? ", or Float" : "",
      ", got ", tensor.scalar_type());
}

inline Sizes check_inputs(const at::Tensor& value, at::IntArrayRef spatial_shapes,
                          const at::Tensor& sampling_locations,
                          const at::Tensor& attention_weights) {
  TORCH_CHECK_VALUE(value.dim() == 4, "ms_deform_attn: value: expected shape (N, S, M, D), got ",
                    value.sizes());
  const auto type = value.scalar_type();
  TORCH_CHECK_VALUE(
      type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16,
      "ms_deform_attn: value: expected float32, float64, float16 or bfloat16, got ", type);
  check_like_value("value", value, value, false);
  check_like_value("sampling_locations", sampling_locations, value, true);
  check_like_value("attention_weights", attention_weights, value, true);

  bool valid = !spatial_shapes.empty() && spatial_shapes.size() % 2 == 0;
  for (const int64_t size : spatial_shapes) valid = valid && size >= 1;
  TORCH_CHECK_VALUE(valid,
                    "ms_deform_attn: spatial_shapes: expected height and width, at least 1, of at "
                    "least one level, got ",
                    spatial_shapes);
  int64_t unused_tokens = value.size(1);
  for (size_t i = 0; valid && i < spatial_shapes.size(); i += 2) {
    // Divided, since the product of absurd sizes would overflow.
    valid = spatial_shapes[i] <= unused_tokens / spatial_shapes[i + 1];
    if (valid) unused_tokens -= spatial_shapes[i] * spatial_shapes[i + 1];
  }
  TORCH_CHECK_VALUE(valid && unused_tokens == 0,
                    "ms_deform_attn: value: expected S to be the sum of height * width over "
                    "spatial_shapes ",
                    spatial_shapes, ", got S = ", value.size(1));

  const int64_t levels = static_cast<int64_t>(spatial_shapes.size() / 2);
  TORCH_CHECK_VALUE(
      sampling_locations.dim() == 6 && sampling_locations.size(0) == value.size(0) &&
          sampling_locations.size(2) == value.size(2) && sampling_locations.size(3) == levels &&
          sampling_locations.size(5) == 2,
      "ms_deform_attn: sampling_locations: expected shape (N, Q, M, L, K, 2) with N = ",
      value.size(0), ", M = ", value.size(2), ", L = ", levels, ", got ",
      sampling_locations.sizes());
  TORCH_CHECK_VALUE(attention_weights.sizes() == sampling_locations.sizes().slice(0, 5),
                    "ms_deform_attn: attention_weights: expected shape (N, Q, M, L, K) = ",
                    sampling_locations.sizes().slice(0, 5), " as in sampling_locations, got ",
                    attention_weights.sizes());
  return {value.size(0),
          value.size(1),
          value.size(2),
          value.size(3),
          sampling_locations.size(1),
          levels,
          sampling_locations.size(4)};
}

// The type of both locations and weights in the kernels.
inline at::ScalarType common_type(const at::Tensor& value, const at::Tensor& sampling_locations,
                                  const at::Tensor& attention_weights) {
  return sampling_locations.scalar_type() == attention_weights.scalar_type()
             ? sampling_locations.scalar_type()
             : accumulation_type(value);
}

// The kernels address the numbers of an image by offsets of 32 bits.
inline void check_offsets(const Sizes& sizes) {
  const int64_t numbers = sizes.tokens * sizes.heads * sizes.channels;
  TORCH_CHECK_VALUE(numbers <= std::numeric_limits<int32_t>::max(),
                    "ms_deform_attn: value: expected at most 2^31 - 1 numbers per image, got S * M "
                    "* D = ",
                    numbers);
}

inline void check_reference_points(const at::Tensor& reference_points, const at::Tensor& value,
                                   const Sizes& sizes) {
  TORCH_CHECK_VALUE(
      reference_points.device() == value.device() && reference_points.is_floating_point(),
      "ms_deform_attn: reference_points: expected a floating point tensor on ", value.device(),
      " as value is, got ", reference_points.scalar_type(), " on ", reference_points.device());
  TORCH_CHECK_VALUE(
      reference_points.dim() == 4 && reference_points.size(0) == sizes.batch &&
          reference_points.size(1) == sizes.queries && reference_points.size(2) == sizes.levels &&
          (reference_points.size(3) == 2 || reference_points.size(3) == 4),
      "ms_deform_attn: reference_points: expected shape (N, Q, L, 2 or 4) with N = ", sizes.batch,
      ", Q = ", sizes.queries, ", L = ", sizes.levels, ", got ", reference_points.sizes());
}

inline void check_grad_output(const at::Tensor& grad_output, const at::Tensor& value,
                              const Sizes& sizes) {
  check_like_value("grad_output", grad_output, value, false);
  const int64_t expected[] = {sizes.batch, sizes.queries, sizes.heads * sizes.channels};
  TORCH_CHECK_VALUE(grad_output.sizes() == at::IntArrayRef(expected),
                    "ms_deform_attn: grad_output: expected shape (N, Q, M * D) = ",
                    at::IntArrayRef(expected), ", got ", grad_output.sizes());
}

}  // namespace ddetr_d2
