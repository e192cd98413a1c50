// Kernels for x86-64 processors with AVX-512.
#if defined(__x86_64__)
#include "kernels_includes.h"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")
#endif

#include "../bilinear.h"

namespace ddetr_d2::avx512 {
namespace {
constexpr int kVectorBytes = 64;
}
#include "kernels_impl.h"
}  // namespace ddetr_d2::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
