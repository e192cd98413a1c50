// The kernels for a GPU. A group of threads, a part of a warp, does one head of one query: each of
// its threads has `kVector` channels next to each other, read and written at once.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../bilinear.h"

namespace ddetr_d2 {

constexpr int kThreads = 256;
// Blocks that a multiprocessor is to have room for: a bound on the registers, just above what the
// loops over the samples need to have the reads of four corners under way at once.
constexpr int kForwardBlocks = 4;
constexpr int kBackwardBlocks = 3;
constexpr int kMaxLevels = 16;
constexpr int kCacheLine = 128;  // bytes
// With fewer threads on a multiprocessor, too few reads are under way to hide how long they take.
constexpr int64_t kEnoughThreads = 1024;

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
  // Of the forward kernel, as logarithms: threads of a group; groups that share the samples of a
  // head of a query; neighbouring heads of a tile. All of these threads are of the same warp.
  int32_t group_bits, part_bits, tile_bits;
};

// Numbers of value that a thread reads at once: 16 bytes, or 8 where those are several numbers, or
// one, as the channels can be split.
inline int vector_for(int64_t channels, int bytes_per_number) {
  for (const int bytes : {16, 8}) {
    const int count = bytes / bytes_per_number;
    if (count > 1 && channels % count == 0 && (bytes == 16 || bytes_per_number == 2)) return count;
  }
  return 1;
}

inline int32_t group_for(int64_t channels, int vector) {
  int32_t group = 1;
  while (group < 32 && group * vector < channels) group *= 2;
  return group;
}

// Sets how the forward kernel divides the work.
inline void set_forward_bits(CudaCall& call, int bytes_per_number, int multiprocessors) {
  call.group_bits = call.part_bits = call.tile_bits = 0;
  while (1 << call.group_bits < call.group) ++call.group_bits;
  const auto threads = [&] { return call.group << call.part_bits << call.tile_bits; };
  // Heads that lie side by side in a cache line.
  while ((2 << call.tile_bits) * call.channels * bytes_per_number <= kCacheLine &&
         2 << call.tile_bits <= call.heads && 2 * threads() <= 32) {
    ++call.tile_bits;
  }
  // Several groups for a head of a query, where there would be too few threads otherwise.
  const int64_t heads = call.batch * call.queries * call.heads;
  while (call.group << call.part_bits < call.levels * call.points && 2 * threads() <= 32 &&
         heads * call.group << call.part_bits < kEnoughThreads * multiprocessors) {
    ++call.part_bits;
  }
}

// Blocks of the forward kernel, one for each tile of heads and queries of an image.
inline int64_t forward_blocks(const CudaCall& call, int threads) {
  const int64_t tile_queries = threads >> call.group_bits >> call.part_bits >> call.tile_bits;
  const int64_t tile_heads = int64_t{1} << call.tile_bits;
  return call.batch * ((call.queries + tile_queries - 1) / tile_queries) *
         ((call.heads + tile_heads - 1) / tile_heads);
}

// Blocks of the backward kernel that have a group for each of `items`: a head of a query or, in
// order, a level of a head; with fewer, as a launch allows only so many, groups do several.
inline unsigned backward_blocks(int64_t items, int32_t group, int threads) {
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

// What an instruction reads or writes as a whole. Structures the compiler may take apart.
template <int bytes>
using Bits = std::conditional_t<
    bytes == 16, uint4,
    std::conditional_t<bytes == 8, uint2, std::conditional_t<bytes == 4, uint32_t, uint16_t>>>;

// `kVector` numbers as they are in memory. Pairs of 16 bits stay in one register until they are
// used: an array of them takes a register, or even a place in local memory, for each.
template <typename scalar_t, int kVector>
struct Numbers {
  static constexpr bool kPairs = sizeof(scalar_t) == 2 && kVector % 2 == 0;
  using word_t = std::conditional_t<kPairs, uint32_t, scalar_t>;
  word_t words[sizeof(scalar_t) * kVector / sizeof(word_t)];

  __device__ __forceinline__ void set_zero() { memset(words, 0, sizeof(words)); }

  __device__ __forceinline__ void read(const scalar_t* from) {
    const auto bits = *reinterpret_cast<const Bits<sizeof(words)>*>(from);
    memcpy(words, &bits, sizeof(words));
  }

  template <typename acc_t>
  __device__ __forceinline__ acc_t at(int v) const {
    if constexpr (!kPairs) {
      return static_cast<acc_t>(words[v]);
    } else if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {  // the upper half of a float
      const uint32_t bits = v % 2 == 0 ? words[v / 2] << 16 : words[v / 2] & 0xffff0000u;
      float number;
      memcpy(&number, &bits, sizeof(number));
      return number;
    } else {
      const auto bits = static_cast<uint16_t>(v % 2 == 0 ? words[v / 2] : words[v / 2] >> 16);
      return static_cast<acc_t>(c10::Half(bits, c10::Half::from_bits()));
    }
  }
};

// Writes the sums as numbers of value's type, which nobody reads soon.
template <typename scalar_t, typename acc_t, int kVector>
__device__ __forceinline__ void write(const acc_t (&sum)[kVector], scalar_t* to) {
  scalar_t numbers[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) numbers[v] = static_cast<scalar_t>(sum[v]);
  Bits<sizeof(numbers)> bits;
  memcpy(&bits, numbers, sizeof(numbers));
  __stcs(reinterpret_cast<Bits<sizeof(numbers)>*>(to), bits);
}

template <typename acc_t>
struct Location {
  acc_t x, y;
};

// The location of a sample as a fraction of the level: what is in memory or, where `kReference` is
// 2 or 4, an offset from there to be added to the level's reference point or box.
template <int kReference, typename acc_t, typename location_t>
__device__ __forceinline__ Location<acc_t> read_location(const CudaCall& call, const Levels& levels,
                                                         int level, const acc_t* reference,
                                                         const location_t* location) {
  const auto xy = *reinterpret_cast<const Pack<location_t, 2>*>(location);
  const Location<acc_t> given{static_cast<acc_t>(xy.at[0]), static_cast<acc_t>(xy.at[1])};
  if constexpr (kReference == 0) return given;
  reference += level * kReference;
  if constexpr (kReference == 2) {
    return {reference[0] + given.x / static_cast<acc_t>(levels.columns[level]),
            reference[1] + given.y / static_cast<acc_t>(levels.rows[level])};
  } else {
    const acc_t unit = acc_t(0.5f) / static_cast<acc_t>(call.points);
    return {reference[0] + given.x * reference[2] * unit,
            reference[1] + given.y * reference[3] * unit};
  }
}

template <typename acc_t>
__device__ __forceinline__ Corners<acc_t, int32_t> corners_of(const CudaCall& call,
                                                              const Levels& levels, int level,
                                                              const Location<acc_t>& location) {
  const int32_t rows = levels.rows[level];
  const int32_t columns = levels.columns[level];
  const int32_t stride = call.heads * call.channels;
  const Layout<int32_t> layout{columns, rows, levels.first_token[level] * stride, columns * stride,
                               stride};
  return find_corners(location.x, location.y, static_cast<acc_t>(columns), static_cast<acc_t>(rows),
                      layout);
}

template <typename T>
struct alignas(16) Four {
  T at[4];
};

// A block does a tile: neighbouring queries, whose samples tend to be near each other, and as few
// neighbouring heads as fill a cache line, so that many pixels are found in the L1 cache.
//
// Where `kReference` is 2 or 4, `locations` has offsets from the reference points or boxes (N, Q,
// L, kReference), and `weights` numbers whose softmax over the samples of a head is meant.
//
// All threads of a warp go through the loops over the samples in step, those without a query or
// channels of their own without reading pixels.
template <typename scalar_t, typename acc_t, typename location_t, int kVector, int kReference>
__global__ void __launch_bounds__(kThreads, kForwardBlocks)
    forward_kernel(const CudaCall call, const Levels levels, const scalar_t* __restrict__ value,
                   const acc_t* __restrict__ reference, const location_t* __restrict__ locations,
                   const location_t* __restrict__ weights, scalar_t* __restrict__ output) {
  // Of the sample that each thread has found: the corners' offsets from the head's first pixel,
  // negative outside, and their shares in the output.
  __shared__ Four<int32_t> offsets[kThreads];
  __shared__ Four<acc_t> shares[kThreads];
  constexpr unsigned warp = 0xffffffffu;
  const int shared_by = call.group << call.part_bits;  // threads for a head of a query
  const int lane = threadIdx.x & (call.group - 1);
  const int part = (threadIdx.x & (shared_by - 1)) >> call.group_bits;
  const int in_tile = threadIdx.x >> call.group_bits >> call.part_bits;

  const unsigned tile_queries = blockDim.x >> call.group_bits >> call.part_bits >> call.tile_bits;
  const unsigned query_tiles = (call.queries + tile_queries - 1) / tile_queries;
  const unsigned head_tiles = (call.heads + (1 << call.tile_bits) - 1) >> call.tile_bits;
  const unsigned row_tile = blockIdx.x / head_tiles;
  const unsigned image = row_tile / query_tiles;
  const int head =
      ((blockIdx.x % head_tiles) << call.tile_bits) + (in_tile & ((1 << call.tile_bits) - 1));
  const int query = (row_tile % query_tiles) * tile_queries + (in_tile >> call.tile_bits);
  const bool exists = head < call.heads && query < call.queries;
  const int64_t row = exists ? static_cast<int64_t>(image) * call.queries + query : 0;
  const int64_t item = exists ? row * call.heads + head : 0;
  const int all = call.levels * call.points;
  locations += 2 * item * all;
  weights += item * all;
  if constexpr (kReference != 0) reference += row * call.levels * kReference;

  acc_t largest = -INFINITY;
  if constexpr (kReference != 0) {
    for (int s = lane; s < all; s += call.group) {
      const acc_t number = static_cast<acc_t>(weights[s]);
      largest = number > largest ? number : largest;
    }
    for (int distance = call.group / 2; distance > 0; distance /= 2) {
      const acc_t other = __shfl_xor_sync(warp, largest, distance);
      largest = other > largest ? other : largest;
    }
  }
  for (int c0 = 0; c0 < call.channels; c0 += call.group * kVector) {
    const int c = c0 + lane * kVector;
    const bool active = exists && c < call.channels;
    const scalar_t* pixels = value + (image * call.tokens * call.heads + head) * call.channels + c;
    acc_t sum[kVector] = {};
    acc_t total = 0;  // of the weights
    for (int start = 0; start < all; start += shared_by) {
      const int first = start + (part << call.group_bits);
      const int mine = min(first + lane, all - 1);
      const int level = mine / call.points;
      const auto corners = corners_of(
          call, levels, level,
          read_location<kReference>(call, levels, level, reference, locations + 2 * mine));
      acc_t weight = static_cast<acc_t>(weights[mine]);
      if constexpr (kReference != 0) {
        weight = exp(weight - largest);
        if (first + lane < all) total += weight;
      }
      Four<int32_t> offset;
      Four<acc_t> share;
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        offset.at[corner] = corners.place[corner];
        // Zero also where the weight is NaN.
        share.at[corner] = corners.place[corner] < 0 ? acc_t(0) : weight * corners.share(corner);
      }
      __syncwarp();  // The samples of before are no longer needed.
      offsets[threadIdx.x] = offset;
      shares[threadIdx.x] = share;
      __syncwarp();
      if (!active) continue;
      const int count = min(call.group, all - first);
      for (int s = 0; s < count; ++s) {
        const Four<int32_t> place = offsets[threadIdx.x - lane + s];
        const Four<acc_t> of_corner = shares[threadIdx.x - lane + s];
        Numbers<scalar_t, kVector> pixel[4];  // all read before the first is used
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          pixel[corner].set_zero();
          if (place.at[corner] >= 0) pixel[corner].read(pixels + place.at[corner]);
        }
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            sum[v] += of_corner.at[corner] * pixel[corner].template at<acc_t>(v);
          }
        }
      }
    }
    for (int distance = call.group; distance < shared_by; distance *= 2) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) sum[v] += __shfl_xor_sync(warp, sum[v], distance);
    }
    if constexpr (kReference != 0) {
      for (int distance = shared_by / 2; distance > 0; distance /= 2) {
        total += __shfl_xor_sync(warp, total, distance);
      }
      const acc_t factor = all > 0 ? 1 / total : acc_t(0);
#pragma unroll
      for (int v = 0; v < kVector; ++v) sum[v] *= factor;
    }
    if (active && part == 0) write(sum, output + item * call.channels + c);
  }
}

// to[v] += amount[v]
template <typename acc_t, int kVector>
__device__ __forceinline__ void atomic_add(acc_t* to, const acc_t (&amount)[kVector]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
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

// A work item is a head of a query, with all levels; or, where `kInOrder` is set, one level of a
// head of an image with all queries: then each number of grad_value is summed by one thread in the
// order of the queries. All threads of a warp go through the loops in step, those of a group beyond
// the last item without reading values or writing, so that shuffles always have the whole warp.
template <typename scalar_t, typename acc_t, typename location_t, int kVector, bool kInOrder>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    backward_kernel(const CudaCall call, const Levels levels,
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
      call.batch * call.heads * (kInOrder ? call.levels : static_cast<int64_t>(call.queries));
  for (int64_t first_item =
           (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x / 32 * 32) / call.group;
       first_item < items; first_item += groups) {
    const bool exists = first_item + my_group < items;
    const int64_t item = exists ? first_item + my_group : items - 1;
    const int head = item % call.heads;
    const int64_t outer = item / call.heads;  // image and query, or image and level
    const int64_t image = outer / (kInOrder ? call.levels : call.queries);
    const int first_level = kInOrder ? outer % call.levels : 0;
    const int last_level = kInOrder ? first_level + 1 : call.levels;
    const int64_t first_row = kInOrder ? image * call.queries : outer;
    const int rows = kInOrder ? call.queries : 1;
    const int samples = (last_level - first_level) * call.points;
    const int64_t base = (image * call.tokens * call.heads + head) * call.channels;
    const scalar_t* pixels = value + base;
    acc_t* grad_pixels = grad_value + base;
    for (int row = 0; row < rows; ++row) {
      const int64_t row_head = (first_row + row) * call.heads + head;
      const scalar_t* row_grad = grad_output + row_head * call.channels;
      Numbers<scalar_t, kVector> first_grad;  // all that there is, if the group covers the channels
      first_grad.set_zero();
      if (lane * kVector < call.channels) first_grad.read(row_grad + lane * kVector);
      const int64_t row_sample = row_head * call.levels * call.points + first_level * call.points;
      // As many samples at a time as the group has threads: each finds the corners of one, all
      // together go through the pixels, and each writes the gradients of one.
      for (int first = 0; first < samples; first += call.group) {
        const int mine = min(first + lane, samples - 1);
        const int my_level = first_level + mine / call.points;
        const auto location = read_location<0, acc_t>(call, levels, my_level, nullptr,
                                                      locations + 2 * (row_sample + mine));
        auto corners = corners_of(call, levels, my_level, location);
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
            Numbers<scalar_t, kVector> grad = first_grad;
            if (c >= call.group * kVector) grad.read(row_grad + c);
            Numbers<scalar_t, kVector> pixel[4];  // all read before the first is used
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
              pixel[corner].set_zero();
              if (offset[corner] >= 0) pixel[corner].read(pixels + (offset[corner] + c));
            }
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
              if (offset[corner] < 0) continue;
              const acc_t share = weight * found.share(corner);
              acc_t amount[kVector];
#pragma unroll
              for (int v = 0; v < kVector; ++v) {
                const acc_t g = grad.template at<acc_t>(v);
                sum[corner] += g * pixel[corner].template at<acc_t>(v);
                amount[v] = share * g;
              }
              atomic_add(grad_pixels + (offset[corner] + c), amount);
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
