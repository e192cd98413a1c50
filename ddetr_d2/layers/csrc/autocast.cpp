// Under autocast the value, where the memory traffic is, takes the autocast type. Locations and
// weights become float32: a location of 16 bits would be off by up to a quarter of a pixel on a map
// 134 pixels wide.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace ddetr_d2 {
namespace {

template <c10::DispatchKey autocast_key, c10::DeviceType device>
at::Tensor ms_deform_attn_autocast(const at::Tensor& value, c10::SymIntArrayRef spatial_shapes,
                                   const at::Tensor& sampling_locations,
                                   const at::Tensor& attention_weights) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(autocast_key);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ddetr_d2::ms_deform_attn", "")
                             .typed<at::Tensor(const at::Tensor&, c10::SymIntArrayRef,
                                               const at::Tensor&, const at::Tensor&)>();
  return op.call(at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), value, device),
                 spatial_shapes, at::autocast::cached_cast(at::kFloat, sampling_locations, device),
                 at::autocast::cached_cast(at::kFloat, attention_weights, device));
}

}  // namespace

TORCH_LIBRARY_IMPL(ddetr_d2, AutocastCPU, m) {
  m.impl("ms_deform_attn",
         TORCH_FN((ms_deform_attn_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>)));
}

TORCH_LIBRARY_IMPL(ddetr_d2, AutocastCUDA, m) {
  m.impl("ms_deform_attn",
         TORCH_FN((ms_deform_attn_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>)));
}

}  // namespace ddetr_d2
