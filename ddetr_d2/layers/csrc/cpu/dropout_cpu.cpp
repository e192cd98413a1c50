// Dropout whose random numbers depend on a seed and the index of each element alone: threads share
// the work, and the backward pass computes the mask again instead of keeping it.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>

#include "../check.h"
#include "../tensors.h"

namespace ddetr_d2 {
namespace {

// Random words are made in blocks: four of each of kLanes generators side by side. Each half of a
// word decides about an element.
constexpr int64_t kLanes = 16, kWords = 4 * kLanes, kBlock = 2 * kWords;
// Blocks below which one more thread costs more than it saves.
constexpr int64_t kBlocksPerTask = 128;

// Compiled for several kinds of processors, of which the right one is chosen when the library is
// loaded; other compilers than these do not know the names.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
#define DDETR_D2_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DDETR_D2_CLONES
#endif

// Philox4x32 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), with seven
// rounds, which pass the tests of BigCrush there.
__attribute__((always_inline)) inline void random_block(int64_t block, uint64_t seed,
                                                        uint32_t (&to)[kWords]) {
  uint32_t *a = to, *b = to + kLanes, *c = to + 2 * kLanes, *d = to + 3 * kLanes;
  for (int64_t i = 0; i < kLanes; ++i) {
    const uint64_t counter = static_cast<uint64_t>(block * kLanes + i);
    a[i] = static_cast<uint32_t>(counter);
    b[i] = static_cast<uint32_t>(counter >> 32);
    c[i] = d[i] = 0;
  }
  uint32_t key = static_cast<uint32_t>(seed), other_key = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const uint64_t first = uint64_t{0xD2511F53} * a[i], second = uint64_t{0xCD9E8D57} * c[i];
      a[i] = static_cast<uint32_t>(second >> 32) ^ b[i] ^ key;
      c[i] = static_cast<uint32_t>(first >> 32) ^ d[i] ^ other_key;
      b[i] = static_cast<uint32_t>(second);
      d[i] = static_cast<uint32_t>(first);
    }
    key += 0x9E3779B9;
    other_key += 0xBB67AE85;
  }
}

struct Dropout {
  const void* input;
  const void* residual;  // added to the output, of its type; or null
  void* output;
  int64_t numel;
  double probability;  // of a number to become zero
  uint64_t seed;
  bool relu;  // negative numbers become zero as well
};

template <typename input_t, typename output_t>
__attribute__((always_inline)) inline void drop(const Dropout& call, int64_t begin, int64_t end) {
  using real = std::conditional_t<std::is_same_v<input_t, double>, double, float>;
  const auto* input = static_cast<const input_t*>(call.input);
  const auto* residual = static_cast<const output_t*>(call.residual);
  auto* output = static_cast<output_t*>(call.output);
  const double keep = 1 - call.probability;
  const auto limit = static_cast<uint32_t>(std::lround(std::ldexp(keep, 16)));
  const real scale = keep > 0 ? static_cast<real>(1 / keep) : 0;
  const real least = call.relu ? real{0} : -std::numeric_limits<real>::infinity();
  uint32_t random[kWords] = {};
  for (int64_t block = begin; block < end; ++block) {
    if (keep < 1) random_block(block, call.seed, random);
    for (int half = 0; half < 2; ++half) {
      const int64_t first = block * kBlock + half * kWords;
      const int64_t count = std::min(kWords, call.numel - first);
      for (int64_t i = 0; i < count; ++i) {
        const auto number = static_cast<real>(input[first + i]);
        real kept = number < least ? least : number;  // NaN stays
        kept = (random[i] >> 16 * half & 0xffff) < limit ? kept * scale : real{0};
        if (residual != nullptr) kept += static_cast<real>(residual[first + i]);
        output[first + i] = static_cast<output_t>(kept);
      }
    }
  }
}

DDETR_D2_CLONES void drop_float(const Dropout& call, int64_t begin, int64_t end) {
  drop<float, float>(call, begin, end);
}
DDETR_D2_CLONES void drop_double(const Dropout& call, int64_t begin, int64_t end) {
  drop<double, double>(call, begin, end);
}
DDETR_D2_CLONES void drop_half(const Dropout& call, int64_t begin, int64_t end) {
  drop<c10::Half, c10::Half>(call, begin, end);
}
DDETR_D2_CLONES void drop_bfloat16(const Dropout& call, int64_t begin, int64_t end) {
  drop<c10::BFloat16, c10::BFloat16>(call, begin, end);
}
DDETR_D2_CLONES void drop_half_to_float(const Dropout& call, int64_t begin, int64_t end) {
  drop<c10::Half, float>(call, begin, end);
}
DDETR_D2_CLONES void drop_bfloat16_to_float(const Dropout& call, int64_t begin, int64_t end) {
  drop<c10::BFloat16, float>(call, begin, end);
}

void run(const Tensor& input, double probability, int64_t seed,
         const std::optional<Tensor>& residual, bool relu, Tensor& output) {
  const Dropout call{input.const_data_ptr(),
                     residual ? residual->const_data_ptr() : nullptr,
                     output.mutable_data_ptr(),
                     input.numel(),
                     probability,
                     static_cast<uint64_t>(seed),
                     relu};
  const bool widens = output.scalar_type() != input.scalar_type();
  auto* kernel = drop_float;
  switch (input.scalar_type()) {
    case ScalarType::Double:
      kernel = drop_double;
      break;
    case ScalarType::Half:
      kernel = widens ? drop_half_to_float : drop_half;
      break;
    case ScalarType::BFloat16:
      kernel = widens ? drop_bfloat16_to_float : drop_bfloat16;
      break;
    default:
      break;
  }
  torch::stable::parallel_for(0, (call.numel + kBlock - 1) / kBlock, kBlocksPerTask,
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

void check(const Tensor& input, double probability, const std::optional<Tensor>& residual) {
  STD_TORCH_CHECK(is_supported(input.scalar_type()), "dropout: expected floating point, got ",
                  input.scalar_type());
  STD_TORCH_CHECK(probability >= 0 && probability <= 1,
                  "dropout: expected a probability between 0 and 1, got ", probability);
  if (!residual) return;
  const ScalarType type = residual->scalar_type();
  STD_TORCH_CHECK(
      residual->sizes().equals(input.sizes()) &&
          (type == input.scalar_type() || type == accumulation_type(input.scalar_type())),
      "dropout: expected a residual with the shape and type of the input, or float32");
}

Tensor dropout_cpu(const Tensor& input, double probability, int64_t seed,
                   const std::optional<Tensor>& residual, bool relu) {
  check(input, probability, residual);
  const Tensor from = contiguous(input, input.scalar_type());
  std::optional<Tensor> added;
  if (residual) added = contiguous(*residual, residual->scalar_type());
  Tensor output = empty(from.sizes(), (residual ? *residual : input).scalar_type(), from);
  run(from, probability, seed, added, relu, output);
  return output;
}

Tensor dropout_in_place_cpu(Tensor input, double probability, int64_t seed,
                            const std::optional<Tensor>& residual, bool relu) {
  check(input, probability, residual);
  STD_TORCH_CHECK(input.is_contiguous(), "dropout_: expected a contiguous tensor");
  std::optional<Tensor> added;
  if (residual) added = contiguous(*residual, input.scalar_type());
  run(input, probability, seed, added, relu, input);
  return input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ddetr_d2, CPU, m) {
  m.impl("dropout", TORCH_BOX(&dropout_cpu));
  m.impl("dropout_", TORCH_BOX(&dropout_in_place_cpu));
}

}  // namespace ddetr_d2
