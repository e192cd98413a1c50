// The few things that the kernels need of tensors, by PyTorch's stable ABI: what is compiled here
// runs with every PyTorch from TORCH_TARGET_VERSION on.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace ddetr_d2 {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using IntArrayRef = torch::headeronly::IntHeaderOnlyArrayRef;

inline std::string text(IntArrayRef numbers) {
  std::ostringstream stream;
  stream << '[';
  for (size_t i = 0; i < numbers.size(); ++i) stream << (i == 0 ? "" : ", ") << numbers[i];
  stream << ']';
  return stream.str();
}

inline std::string device_name(const Tensor& tensor) {
  const auto device = tensor.device();
  switch (device.type()) {
    case DeviceType::CPU:
      return "cpu";
    case DeviceType::CUDA:
      return "cuda:" + std::to_string(device.index());
    case DeviceType::Meta:
      return "meta";
    default:
      return "another kind of device";
  }
}

// Raises Python's ValueError with the arguments, one after the other, as its message. Newer
// versions of PyTorch make a RuntimeError of it, and ms_deform_attn.py a ValueError again.
template <typename... Args>
[[noreturn, gnu::cold, gnu::noinline]] void raise_value_error(const Args&... args) {
  std::ostringstream stream;
  stream << "ms_deform_attn: ";
  (stream << ... << args);
  throw std::invalid_argument(stream.str());
}

// The tensor itself where it is of that type and contiguous.
inline Tensor contiguous(Tensor tensor, ScalarType type) {
  if (tensor.scalar_type() != type) tensor = torch::stable::to(tensor, type);
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor to_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

inline Tensor empty(IntArrayRef sizes, ScalarType type, const Tensor& like) {
  std::array<int64_t, 8> strides{};
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  int32_t device = 0, dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  // Without a search for the operator by its name, which takes a microsecond.
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, device,
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor zeros(IntArrayRef sizes, ScalarType type, const Tensor& like) {
  Tensor tensor = empty(sizes, type, like);
  torch::stable::zero_(tensor);
  return tensor;
}

inline int64_t bytes(const Tensor& tensor) {
  return tensor.numel() * static_cast<int64_t>(tensor.element_size());
}

}  // namespace ddetr_d2
