// The kernels for a GPU. A group of threads, a part of a warp, does one head of one query: each of
// its threads has `kVector` channels next to each other, read and written at once.
#pragma once

#include <cstdint>

#include "../bilinear.h"

namespace ddetr_d2 {

constexpr int kThreads = 256;
// Blocks that a multiprocessor is to have room for: a bound on the registers, just above what the
// loops over the samples need to have the reads of four corners under way at once.
constexpr int kForwardBlocks = 5;
constexpr int kBackwardBlocks = 3;
constexpr int kMaxLevels = 16;
// Samples of a block whose corners are in shared memory at a time, at least one per thread.
constexpr int kSharedSamples = 512;

// Passed by value as a kernel argument: no copy to the device.
struct Levels {
  int32_t rows[kMaxLevels];
  int32_t columns[kMaxLevels];
  int32_t first_token[kMaxLevels];
};

struct CudaCall {
  int64_t batch, tokens;
  int32_t heads, channels, queries, levels, points;
  int32_t group;  // threads of a group: a power of two, at most a warp
};

// Numbers of value that a thread reads at once: 16 bytes, or one where the channels cannot be split
// so.
inline int vector_for(int64_t channels, int bytes_per_number) {
  const int wide = 16 / bytes_per_number;
  return channels % wide == 0 ? wide : 1;
}

inline int32_t group_for(int64_t channels, int vector) {
  int32_t group = 1;
  while (group < 32 && group * vector < channels) group *= 2;
  return group;
}

// Blocks that have a group for each of `items`, a head of a query or, in the backward kernel in
// order, a level of a head; with fewer, as a launch allows only so many, groups do several.
inline unsigned blocks_for(int64_t items, int32_t group, int threads) {
  constexpr int64_t most = 1 << 30;
  const int64_t per_block = threads / group;
  const int64_t blocks = (items + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

// `count` numbers that are read or written by one instruction.
template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  T at[count];
};

template <typename acc_t>
struct alignas(16) Sample {
  int32_t offset[4];  // of the corner, from the head's first pixel; negative is outside
  acc_t share[4];     // of the corner in the output
};

template <typename acc_t, typename location_t>
__device__ __forceinline__ Corners<acc_t, int32_t> corners_of(const CudaCall& call,
                                                              const Levels& levels, int level,
                                                              const location_t* location) {
  const Pack<location_t, 2> xy = *reinterpret_cast<const Pack<location_t, 2>*>(location);
  const int32_t rows = levels.rows[level];
  const int32_t columns = levels.columns[level];
  const int32_t stride = call.heads * call.channels;
  const Layout<int32_t> layout{columns, rows, levels.first_token[level] * stride, columns * stride,
                               stride};
  return find_corners(static_cast<acc_t>(xy.at[0]), static_cast<acc_t>(xy.at[1]),
                      static_cast<acc_t>(columns), static_cast<acc_t>(rows), layout);
}

// The block's threads together find the corners of `count` samples, from number `first` on, of
// each of the block's items. An item is a head of a query, counted over all images.
template <typename acc_t, typename location_t>
__device__ __forceinline__ void find_samples(const CudaCall& call, const Levels& levels,
                                             const location_t* locations, const location_t* weights,
                                             int64_t first_item, int items, int first, int count,
                                             Sample<acc_t>* samples) {
  const int all = call.levels * call.points;
  const int64_t total = call.batch * call.queries * call.heads;
  __syncthreads();  // The samples of before are no longer needed.
  for (int i = threadIdx.x; i < items * count; i += blockDim.x) {
    const int64_t item = first_item + i / count;
    if (item >= total) break;
    const int64_t place = item * all + first + i % count;
    const int level = (first + i % count) / call.points;
    const auto corners = corners_of<acc_t>(call, levels, level, locations + 2 * place);
    const acc_t weight = static_cast<acc_t>(weights[place]);
    Sample<acc_t> sample;
    for (int corner = 0; corner < 4; ++corner) {
      sample.offset[corner] = corners.place[corner];
      sample.share[corner] = weight * corners.share(corner);
    }
    samples[i] = sample;
  }
  __syncthreads();
}

template <typename scalar_t, typename acc_t, typename location_t, int kVector>
__global__ void __launch_bounds__(kThreads, kForwardBlocks)
    forward_kernel(const CudaCall call, const Levels levels, const scalar_t* __restrict__ value,
                   const location_t* __restrict__ locations, const location_t* __restrict__ weights,
                   scalar_t* __restrict__ output) {
  __shared__ Sample<acc_t> samples[kSharedSamples];
  const int items = blockDim.x / call.group;
  const int my_item = threadIdx.x / call.group;
  const int lane = threadIdx.x % call.group;
  const int all = call.levels * call.points;
  const int at_once = min(all, kSharedSamples / items);
  const int64_t total = call.batch * call.queries * call.heads;
  // The same number of rounds in all threads of a block, which wait for each other.
  for (int64_t first_item = static_cast<int64_t>(blockIdx.x) * items; first_item < total;
       first_item += static_cast<int64_t>(gridDim.x) * items) {
    const int64_t item = first_item + my_item;
    const int64_t image = item / call.heads / call.queries;
    const scalar_t* head = value + (image * call.tokens * call.heads + item % call.heads) *
                                       static_cast<int64_t>(call.channels);
    for (int c0 = 0; c0 < call.channels; c0 += call.group * kVector) {
      const int c = c0 + lane * kVector;
      const bool active = item < total && c < call.channels;
      acc_t sum[kVector] = {};
      for (int first = 0; first < all; first += at_once) {
        const int count = min(at_once, all - first);
        find_samples(call, levels, locations, weights, first_item, items, first, count, samples);
        if (!active) continue;
        for (int s = 0; s < count; ++s) {
          const Sample<acc_t> sample = samples[my_item * count + s];
          Pack<scalar_t, kVector> pixel[4];  // all read before the first is used
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            if (sample.offset[corner] < 0) continue;
            pixel[corner] =
                *reinterpret_cast<const Pack<scalar_t, kVector>*>(head + sample.offset[corner] + c);
          }
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            if (sample.offset[corner] < 0) continue;
#pragma unroll
            for (int v = 0; v < kVector; ++v) {
              sum[v] += sample.share[corner] * static_cast<acc_t>(pixel[corner].at[v]);
            }
          }
        }
      }
      if (!active) continue;
      Pack<scalar_t, kVector> result;
      for (int v = 0; v < kVector; ++v) result.at[v] = static_cast<scalar_t>(sum[v]);
      *reinterpret_cast<Pack<scalar_t, kVector>*>(output + item * call.channels + c) = result;
    }
  }
}

// to[v] += amount[v]
template <typename acc_t, int kVector>
__device__ __forceinline__ void atomic_add(acc_t* to, const acc_t (&amount)[kVector]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr bool by_four = sizeof(acc_t) == 4 && kVector % 4 == 0;
#else
  constexpr bool by_four = false;
#endif
  if constexpr (by_four) {
#pragma unroll
    for (int v = 0; v < kVector; v += 4) {
      atomicAdd(reinterpret_cast<float4*>(to + v),
                make_float4(amount[v], amount[v + 1], amount[v + 2], amount[v + 3]));
    }
  } else {
#pragma unroll
    for (int v = 0; v < kVector; ++v) atomicAdd(to + v, amount[v]);
  }
}

// A work item is a head of a query, with all levels; or, where `in_order` is set, one level of a
// head of an image with all queries: then each number of grad_value is summed by one thread in the
// order of the queries. All threads of a warp go through the loops in step, those of a group beyond
// the last item without reading values or writing, so that shuffles always have the whole warp.
template <typename scalar_t, typename acc_t, typename location_t, int kVector>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    backward_kernel(const CudaCall call, const Levels levels, const bool in_order,
                    const scalar_t* __restrict__ grad_output, const scalar_t* __restrict__ value,
                    const location_t* __restrict__ locations,
                    const location_t* __restrict__ weights, acc_t* __restrict__ grad_value,
                    location_t* __restrict__ grad_locations,
                    location_t* __restrict__ grad_weights) {
  constexpr unsigned warp = 0xffffffffu;
  const int lane = threadIdx.x % call.group;
  const int my_group = threadIdx.x % 32 / call.group;
  const int64_t groups = static_cast<int64_t>(gridDim.x) * blockDim.x / call.group;
  const int64_t items =
      call.batch * call.heads * (in_order ? call.levels : static_cast<int64_t>(call.queries));
  for (int64_t first_item =
           (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x / 32 * 32) / call.group;
       first_item < items; first_item += groups) {
    const bool exists = first_item + my_group < items;
    const int64_t item = exists ? first_item + my_group : items - 1;
    const int head = item % call.heads;
    const int64_t outer = item / call.heads;  // image and query, or image and level
    const int64_t image = outer / (in_order ? call.levels : call.queries);
    const int first_level = in_order ? outer % call.levels : 0;
    const int last_level = in_order ? first_level + 1 : call.levels;
    const int64_t first_row = in_order ? image * call.queries : outer;
    const int rows = in_order ? call.queries : 1;
    const int samples = (last_level - first_level) * call.points;
    const int64_t base = (image * call.tokens * call.heads + head) * call.channels;
    for (int row = 0; row < rows; ++row) {
      const int64_t row_head = (first_row + row) * call.heads + head;
      const scalar_t* row_grad = grad_output + row_head * call.channels;
      Pack<scalar_t, kVector> first_grad{};  // all that there is, if the group covers the channels
      if (lane * kVector < call.channels) {
        first_grad = *reinterpret_cast<const Pack<scalar_t, kVector>*>(row_grad + lane * kVector);
      }
      const int64_t row_sample = row_head * call.levels * call.points + first_level * call.points;
      // As many samples at a time as the group has threads: each finds the corners of one, all
      // together go through the pixels, and each writes the gradients of one.
      for (int first = 0; first < samples; first += call.group) {
        const int mine = min(first + lane, samples - 1);
        const int my_level = first_level + mine / call.points;
        auto corners =
            corners_of<acc_t>(call, levels, my_level, locations + 2 * (row_sample + mine));
        const acc_t attention = static_cast<acc_t>(weights[row_sample + mine]);
        int32_t my_offset[4];
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          my_offset[corner] = exists ? corners.place[corner] : -1;
        }
        const int count = min(call.group, samples - first);
        acc_t product[4] = {};
        for (int s = 0; s < count; ++s) {
          const acc_t weight = __shfl_sync(warp, attention, s, call.group);
          const Corners<acc_t, int32_t> found{{},
                                              __shfl_sync(warp, corners.right, s, call.group),
                                              __shfl_sync(warp, corners.bottom, s, call.group)};
          int32_t offset[4];
          acc_t sum[4] = {};
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            offset[corner] = __shfl_sync(warp, my_offset[corner], s, call.group);
          }
          for (int c = lane * kVector; c < call.channels; c += call.group * kVector) {
            const auto grad = c < call.group * kVector
                                  ? first_grad
                                  : *reinterpret_cast<const Pack<scalar_t, kVector>*>(row_grad + c);
            Pack<scalar_t, kVector> pixel[4];  // all read before the first is used
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
              if (offset[corner] < 0) continue;
              pixel[corner] = *reinterpret_cast<const Pack<scalar_t, kVector>*>(value + base +
                                                                                offset[corner] + c);
            }
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
              if (offset[corner] < 0) continue;
              const acc_t share = weight * found.share(corner);
              acc_t amount[kVector];
#pragma unroll
              for (int v = 0; v < kVector; ++v) {
                const acc_t g = static_cast<acc_t>(grad.at[v]);
                sum[corner] += g * static_cast<acc_t>(pixel[corner].at[v]);
                amount[v] = share * g;
              }
              atomic_add(grad_value + base + offset[corner] + c, amount);
            }
          }
          for (int distance = call.group / 2; distance > 0; distance /= 2) {
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
              sum[corner] += __shfl_xor_sync(warp, sum[corner], distance, call.group);
            }
          }
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            if (lane == s) product[corner] = sum[corner];
          }
        }
        if (!exists || lane >= count) continue;
        const auto grad =
            sample_gradient(corners, attention, static_cast<acc_t>(levels.columns[my_level]),
                            static_cast<acc_t>(levels.rows[my_level]), product);
        Pack<location_t, 2> xy;
        xy.at[0] = static_cast<location_t>(grad.x);
        xy.at[1] = static_cast<location_t>(grad.y);
        *reinterpret_cast<Pack<location_t, 2>*>(grad_locations + 2 * (row_sample + mine)) = xy;
        grad_weights[row_sample + mine] = static_cast<location_t>(grad.attention);
      }
    }
  }
}

}  // namespace ddetr_d2
