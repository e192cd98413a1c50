// Kernels for what every processor of this kind has (SSE2, NEON).
#include "../bilinear.h"
#include "kernels_includes.h"

namespace ddetr_d2::baseline {
namespace {
constexpr int kVectorBytes = 16;
}
#include "kernels_impl.h"
}  // namespace ddetr_d2::baseline
