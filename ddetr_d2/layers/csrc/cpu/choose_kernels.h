// Which of the compiled kernels run, by what this processor has.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>

#include "kernels.h"

namespace ddetr_d2 {

#if defined(__x86_64__)
enum class Capability { kDefault, kAvx2, kAvx512 };

// What this processor has. As in PyTorch's own kernels, the environment variable
// ATEN_CPU_CAPABILITY can ask for less.
inline Capability find_capability() {
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string asked = variable == nullptr ? "" : variable;
  if (asked == "default" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    return Capability::kDefault;
  }
  if (asked == "avx2" || !__builtin_cpu_supports("avx512f") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq")) {
    return Capability::kAvx2;
  }
  return Capability::kAvx512;
}
#endif

// The widest vectors that this processor has and that the channels of a head fill, those of 16 bit
// types in pairs.
inline Kernels choose_kernels(int64_t channels, Type value, Type locations) {
#if defined(__x86_64__)
  static const Capability capability = find_capability();
  const bool is_narrow = value == Type::kHalf || value == Type::kBFloat16;
  if (capability == Capability::kAvx512 && channels % (is_narrow ? 32 : 16) == 0) {
    return avx512::find_kernels(value, locations);
  }
  if (capability != Capability::kDefault && !(is_narrow && channels % 16 != 0)) {
    return avx2::find_kernels(value, locations);
  }
#endif
  return baseline::find_kernels(value, locations);
}

}  // namespace ddetr_d2
