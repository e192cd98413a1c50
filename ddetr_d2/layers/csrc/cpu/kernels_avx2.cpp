// Kernels for x86-64 processors with AVX2 and FMA.
#if defined(__x86_64__)
#include "kernels_includes.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "../bilinear.h"

namespace ddetr_d2::avx2 {
namespace {
constexpr int kVectorBytes = 32;
}
#include "kernels_impl.h"
}  // namespace ddetr_d2::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
