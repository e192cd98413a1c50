#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../bilinear.h"
#include "../check.h"

namespace ddetr_d2 {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;
constexpr int kMaxLevels = 16;
constexpr int64_t kMaxBlocks = 1 << 30;

// Passed by value as a kernel argument: no copy to the device, and a broadcast read in the kernel.
struct LevelShapes {
  int64_t height[kMaxLevels];
  int64_t width[kMaxLevels];
};

LevelShapes level_shapes(at::IntArrayRef spatial_shapes) {
  TORCH_CHECK_VALUE(spatial_shapes.size() <= 2 * kMaxLevels,
                    "ms_deform_attn: spatial_shapes: expected at most ", kMaxLevels,
                    " levels on a GPU, got ", spatial_shapes.size() / 2);
  LevelShapes shapes{};
  for (size_t l = 0; l < spatial_shapes.size() / 2; ++l) {
    shapes.height[l] = spatial_shapes[2 * l];
    shapes.width[l] = spatial_shapes[2 * l + 1];
  }
  return shapes;
}

int blocks_for(int64_t threads) {
  return static_cast<int>(std::min((threads + kThreads - 1) / kThreads, kMaxBlocks));
}

// One thread per channel of a head of a query.
template <typename scalar_t, typename acc_t>
__global__ void forward_kernel(const Sizes sizes, const scalar_t* __restrict__ value,
                               const LevelShapes shapes, const acc_t* __restrict__ locations,
                               const acc_t* __restrict__ weights, scalar_t* __restrict__ output) {
  const int64_t stride = sizes.heads * sizes.channels;
  const int64_t samples = sizes.levels * sizes.points;
  const int64_t total = sizes.batch * sizes.queries * stride;
  for (int64_t index = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; index < total;
       index += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t row = index / sizes.channels;
    const int64_t batch = index / stride / sizes.queries;
    const scalar_t* level = value + batch * sizes.tokens * stride + index % stride;
    const acc_t* location = locations + row * samples * 2;
    const acc_t* weight = weights + row * samples;
    acc_t sum = 0;
    for (int64_t l = 0; l < sizes.levels; ++l) {
      const int64_t height = shapes.height[l];
      const int64_t width = shapes.width[l];
      for (int64_t k = 0; k < sizes.points; ++k, location += 2, ++weight) {
        Corner<acc_t> corners[4];
        if (find_corners(location[0], location[1], height, width, corners)) {
          sample_forward(level, stride, corners, *weight, 1, &sum);
        }
      }
      level += height * width * stride;
    }
    output[index] = static_cast<scalar_t>(sum);
  }
}

template <typename acc_t>
__device__ acc_t warp_sum(acc_t sum) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    sum += __shfl_down_sync(0xffffffff, sum, distance);
  }
  return sum;
}

struct AtomicAdd {
  template <typename acc_t>
  __device__ void operator()(acc_t* to, acc_t amount) const {
    atomicAdd(to, amount);
  }
};

// One warp per head of `queries_per_warp` successive queries, its lanes side by side on the
// channels. Where one warp has all queries of an image, every sum in grad_value is made by one
// thread in a fixed order.
template <typename scalar_t, typename acc_t>
__global__ void backward_kernel(const Sizes sizes, const int64_t queries_per_warp,
                                const scalar_t* __restrict__ grad_output,
                                const scalar_t* __restrict__ value, const LevelShapes shapes,
                                const acc_t* __restrict__ locations,
                                const acc_t* __restrict__ weights, acc_t* __restrict__ grad_value,
                                acc_t* __restrict__ grad_locations,
                                acc_t* __restrict__ grad_weights) {
  const int64_t stride = sizes.heads * sizes.channels;
  const int64_t samples = sizes.levels * sizes.points;
  const int64_t chunks = (sizes.queries + queries_per_warp - 1) / queries_per_warp;
  const int64_t items = sizes.batch * chunks * sizes.heads;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * blockDim.x / kWarpSize;
  for (int64_t item = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / kWarpSize;
       item < items; item += warps) {
    const int64_t head = item % sizes.heads;
    const int64_t batch = item / sizes.heads / chunks;
    const int64_t first_query = item / sizes.heads % chunks * queries_per_warp;
    const int64_t last_query = min(first_query + queries_per_warp, sizes.queries);
    for (int64_t query = first_query; query < last_query; ++query) {
      const int64_t row = (batch * sizes.queries + query) * sizes.heads + head;
      int64_t offset = batch * sizes.tokens * stride + head * sizes.channels;
      int64_t sample = row * samples;
      for (int64_t l = 0; l < sizes.levels; ++l) {
        const int64_t height = shapes.height[l];
        const int64_t width = shapes.width[l];
        for (int64_t k = 0; k < sizes.points; ++k, ++sample) {
          Corner<acc_t> corners[4];
          if (!find_corners(locations[2 * sample], locations[2 * sample + 1], height, width,
                            corners)) {
            continue;  // The same in all lanes.
          }
          const acc_t weight = weights[sample];
          SampleGrad<acc_t> grad;
          for (int64_t c = lane; c < sizes.channels; c += kWarpSize) {
            const acc_t grad_out = static_cast<acc_t>(grad_output[row * sizes.channels + c]);
            sample_backward(value + offset + c, grad_value + offset + c, stride, corners, weight, 1,
                            &grad_out, AtomicAdd(), grad);
          }
          grad.x = warp_sum(grad.x);
          grad.y = warp_sum(grad.y);
          grad.attention = warp_sum(grad.attention);
          if (lane == 0) {
            grad_locations[2 * sample] = grad.x;
            grad_locations[2 * sample + 1] = grad.y;
            grad_weights[sample] = grad.attention;
          }
        }
        offset += height * width * stride;
      }
    }
  }
}

at::Tensor ms_deform_attn_cuda(const at::Tensor& value, at::IntArrayRef spatial_shapes,
                               const at::Tensor& sampling_locations,
                               const at::Tensor& attention_weights) {
  const Sizes sizes = check_inputs(value, spatial_shapes, sampling_locations, attention_weights);
  const LevelShapes shapes = level_shapes(spatial_shapes);
  const c10::cuda::CUDAGuard device_guard(value.device());
  const auto type = accumulation_type(value);
  const at::Tensor values = value.contiguous();
  const at::Tensor locations = sampling_locations.to(type).contiguous();
  const at::Tensor weights = attention_weights.to(type).contiguous();
  at::Tensor output =
      at::empty({sizes.batch, sizes.queries, sizes.heads * sizes.channels}, values.options());
  if (output.numel() == 0) return output;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_cuda", [&] {
        using acc_t = at::opmath_type<scalar_t>;
        forward_kernel<scalar_t, acc_t>
            <<<blocks_for(output.numel()), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
                sizes, values.const_data_ptr<scalar_t>(), shapes, locations.const_data_ptr<acc_t>(),
                weights.const_data_ptr<acc_t>(), output.mutable_data_ptr<scalar_t>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cuda(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef spatial_shapes,
    const at::Tensor& sampling_locations, const at::Tensor& attention_weights) {
  const Sizes sizes = check_inputs(value, spatial_shapes, sampling_locations, attention_weights);
  check_grad_output(grad_output, value, sizes);
  const LevelShapes shapes = level_shapes(spatial_shapes);
  const c10::cuda::CUDAGuard device_guard(value.device());
  const auto type = accumulation_type(value);
  const at::Tensor grad_outputs = grad_output.contiguous();
  const at::Tensor values = value.contiguous();
  const at::Tensor locations = sampling_locations.to(type).contiguous();
  const at::Tensor weights = attention_weights.to(type).contiguous();
  at::Tensor grad_value = at::zeros(values.sizes(), values.options().dtype(type));
  at::Tensor grad_locations = at::zeros(locations.sizes(), locations.options());
  at::Tensor grad_weights = at::zeros(weights.sizes(), weights.options());
  // Slow, since it leaves most of the GPU idle, but the order of all sums is fixed.
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  const int64_t queries_per_warp = deterministic ? sizes.queries : 1;
  const int64_t warps =
      deterministic ? sizes.batch * sizes.heads : sizes.batch * sizes.queries * sizes.heads;
  if (grad_outputs.numel() > 0) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_backward_cuda", [&] {
          using acc_t = at::opmath_type<scalar_t>;
          backward_kernel<scalar_t, acc_t>
              <<<blocks_for(warps * kWarpSize), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
                  sizes, queries_per_warp, grad_outputs.const_data_ptr<scalar_t>(),
                  values.const_data_ptr<scalar_t>(), shapes, locations.const_data_ptr<acc_t>(),
                  weights.const_data_ptr<acc_t>(), grad_value.mutable_data_ptr<acc_t>(),
                  grad_locations.mutable_data_ptr<acc_t>(), grad_weights.mutable_data_ptr<acc_t>());
          C10_CUDA_KERNEL_LAUNCH_CHECK();
        });
  }
  return {grad_value.to(value.scalar_type()), grad_locations.to(sampling_locations.scalar_type()),
          grad_weights.to(attention_weights.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(ddetr_d2, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_FN(ms_deform_attn_cuda));
  m.impl("ms_deform_attn_backward", TORCH_FN(ms_deform_attn_backward_cuda));
}

}  // namespace ddetr_d2
