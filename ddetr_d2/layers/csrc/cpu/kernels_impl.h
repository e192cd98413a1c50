// The kernels, in vectors of kVectorBytes bytes. Included once for each kind of processor, inside
// its namespace and with its instructions enabled. Nothing else is included in these files, and no
// template of another header is instantiated but for those that are always inlined: of a function
// that several files have, the linker keeps one copy, for all processors.
// clang-format off: each needs what stands before it
#include "vectors.h"
#include "samples.h"
#include "forward.h"
#include "backward.h"
// clang-format on

template <typename scalar_t, typename location_t>
Kernels kernels() {
  return {forward<scalar_t, location_t>, backward<scalar_t, location_t>};
}

Kernels find_kernels(Type value, Type locations) {
  switch (value) {
    case Type::kDouble:
      return kernels<double, double>();
    case Type::kHalf:
      return locations == value ? kernels<c10::Half, c10::Half>() : kernels<c10::Half, float>();
    case Type::kBFloat16:
      return locations == value ? kernels<c10::BFloat16, c10::BFloat16>()
                                : kernels<c10::BFloat16, float>();
    default:
      return kernels<float, float>();
  }
}
