// What is checked before a kernel touches memory. The same checks stand in layers/checks.py for
// the routes that do not come through here.
#pragma once

#include <cstdint>
#include <limits>

#include "tensors.h"

namespace ddetr_d2 {

// Sizes of the call: names as in the documentation of ddetr_d2.layers.ms_deform_attn.
struct Sizes {
  int64_t batch, tokens, heads, channels, queries, levels, points;
};

// Locations and weights are converted to this type: sums of 16 bit values are made in float.
inline ScalarType accumulation_type(ScalarType value) {
  return value == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool is_supported(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& value) {
  if (tensor.device() != value.device()) {
    raise_value_error(name, ": expected device ", device_name(value), " as value has, got ",
                      device_name(tensor));
  }
}

inline void check_like_value(const char* name, const Tensor& tensor, const Tensor& value,
                             bool or_accumulation_type) {
  check_device(name, tensor, value);
  const ScalarType type = tensor.scalar_type(), expected = value.scalar_type();
  const ScalarType other = or_accumulation_type ? accumulation_type(expected) : expected;
  if (type != expected && type != other) {
    raise_value_error(name, ": expected type ", expected, " as value has",
                      other == expected ? "" : ", or Float", ", got ", type);
  }
}

inline Sizes check_inputs(const Tensor& value, IntArrayRef spatial_shapes,
                          const Tensor& sampling_locations, const Tensor& attention_weights) {
  const IntArrayRef sizes = value.sizes();
  if (sizes.size() != 4) {
    raise_value_error("value: expected shape (N, S, M, D), got ", text(sizes));
  }
  const ScalarType type = value.scalar_type();
  if (!is_supported(type)) {
    raise_value_error("value: expected float32, float64, float16 or bfloat16, got ", type);
  }
  check_like_value("sampling_locations", sampling_locations, value, true);
  check_like_value("attention_weights", attention_weights, value, true);

  bool valid = !spatial_shapes.empty() && spatial_shapes.size() % 2 == 0;
  for (const int64_t size : spatial_shapes) valid = valid && size >= 1;
  if (!valid) {
    raise_value_error(
        "spatial_shapes: expected height and width, at least 1, of at least one level, got ",
        text(spatial_shapes));
  }
  int64_t unused_tokens = sizes[1];
  for (size_t i = 0; valid && i < spatial_shapes.size(); i += 2) {
    // Divided, since the product of absurd sizes would overflow.
    valid = spatial_shapes[i] <= unused_tokens / spatial_shapes[i + 1];
    if (valid) unused_tokens -= spatial_shapes[i] * spatial_shapes[i + 1];
  }
  if (!valid || unused_tokens != 0) {
    raise_value_error("value: expected S to be the sum of height * width over spatial_shapes ",
                      text(spatial_shapes), ", got S = ", sizes[1]);
  }

  const int64_t levels = static_cast<int64_t>(spatial_shapes.size() / 2);
  const IntArrayRef locations = sampling_locations.sizes();
  if (locations.size() != 6 || locations[0] != sizes[0] || locations[2] != sizes[2] ||
      locations[3] != levels || locations[5] != 2) {
    raise_value_error("sampling_locations: expected shape (N, Q, M, L, K, 2) with N = ", sizes[0],
                      ", M = ", sizes[2], ", L = ", levels, ", got ", text(locations));
  }
  const IntArrayRef weights = attention_weights.sizes();
  if (!weights.equals(locations.slice(0, 5))) {
    raise_value_error(
        "attention_weights: expected shape (N, Q, M, L, K) = ", text(locations.slice(0, 5)),
        " as in sampling_locations, got ", text(weights));
  }
  return {sizes[0], sizes[1], sizes[2], sizes[3], locations[1], levels, locations[4]};
}

// The type of both locations and weights in the kernels.
inline ScalarType common_type(const Tensor& value, const Tensor& sampling_locations,
                              const Tensor& attention_weights) {
  const ScalarType type = sampling_locations.scalar_type();
  return type == attention_weights.scalar_type() ? type : accumulation_type(value.scalar_type());
}

// The kernels address the numbers of an image by offsets of 32 bits.
inline void check_offsets(const Sizes& sizes) {
  const int64_t numbers = sizes.tokens * sizes.heads * sizes.channels;
  if (numbers > std::numeric_limits<int32_t>::max()) {
    raise_value_error("value: expected at most 2^31 - 1 numbers per image, got S * M * D = ",
                      numbers);
  }
}

inline void check_reference_points(const Tensor& reference_points, const Tensor& value,
                                   const Sizes& sizes) {
  check_device("reference_points", reference_points, value);
  const ScalarType type = reference_points.scalar_type();
  if (!is_supported(type)) {
    raise_value_error("reference_points: expected a floating point tensor, got ", type);
  }
  const IntArrayRef shape = reference_points.sizes();
  if (shape.size() != 4 || shape[0] != sizes.batch || shape[1] != sizes.queries ||
      shape[2] != sizes.levels || (shape[3] != 2 && shape[3] != 4)) {
    raise_value_error("reference_points: expected shape (N, Q, L, 2 or 4) with N = ", sizes.batch,
                      ", Q = ", sizes.queries, ", L = ", sizes.levels, ", got ", text(shape));
  }
}

inline void check_grad_output(const Tensor& grad_output, const Tensor& value, const Sizes& sizes) {
  check_like_value("grad_output", grad_output, value, false);
  const std::array<int64_t, 3> expected{sizes.batch, sizes.queries, sizes.heads * sizes.channels};
  if (!grad_output.sizes().equals(expected)) {
    raise_value_error("grad_output: expected shape (N, Q, M * D) = ", text(expected), ", got ",
                      text(grad_output.sizes()));
  }
}

}  // namespace ddetr_d2
