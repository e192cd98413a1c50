// As much of CUDA as the kernels use, on a CPU: each thread of a block is a std::thread, the blocks
// run one after the other. To be included before the kernels, and after the headers that look
// whether they are compiled for CUDA.
//
// It is stricter than a GPU: a barrier or a shuffle that not all of its threads reach ends the
// program with a message, as does one that they reach at different places, with different masks or
// widths, or that reads from a thread outside of the mask. Memory is left to the sanitizers, which
// see the threads of a block as what they are: waiting in a shuffle orders the memory accesses of
// the threads in its mask, and of no others.
#pragma once

#include <atomic>
#include <barrier>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <source_location>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // One block runs at a time.
#define CUDART_VERSION 13000

struct Dimensions {
  unsigned x = 1, y = 1, z = 1;
};
inline thread_local Dimensions threadIdx, blockIdx;
inline Dimensions blockDim, gridDim;

inline int min(int a, int b) { return a < b ? a : b; }

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
template <typename T>
void __stcs(T* to, const T& value) {
  *to = value;
}

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;

[[noreturn]] inline void fail(const char* what, const std::source_location& where) {
  std::fprintf(stderr, "cuda_on_cpu: block %u, thread %u: %s (%s:%u)\n", blockIdx.x, threadIdx.x,
               what, where.file_name(), where.line());
  std::fflush(stderr);
  std::_Exit(3);  // The other threads may wait for ever.
}

// What the threads that meet have to agree upon.
struct Call {
  const char* name;
  unsigned line, column, mask, width;
  size_t bytes;
  bool operator==(const Call&) const = default;
};

// Where threads wait for each other, again and again. In a shuffle each leaves its number here; of
// the numbers of two rounds, so that a fast thread does not overwrite what a slow one has to read.
struct Meeting {
  std::mutex mutex;
  // Not std::atomic's wait: that shares state with all other waits of the program, which the
  // sanitizer takes for an order of the threads.
  std::condition_variable changed;
  unsigned round = 0;
  unsigned arrived = 0;
  Call call{};
  alignas(16) unsigned char number[2][kWarp][16];
};

struct Block {
  explicit Block(unsigned threads)
      : threads(threads), running(threads), unfinished(threads), shuffles(threads) {}

  const unsigned threads;
  // Threads that do not wait for others. Relaxed, so that the sanitizer takes it for no order.
  std::atomic<unsigned> running, unfinished;
  Meeting all;
  std::vector<Meeting> shuffles;  // at the number of the mask's first thread

  void one_less_running(const std::source_location& where) {
    if (running.fetch_sub(1, std::memory_order_relaxed) == 1 &&
        unfinished.load(std::memory_order_relaxed) > 0) {
      fail("all threads wait for others or have ended: some did not come to a barrier or shuffle",
           where);
    }
  }

  // Waits until `expected` threads have come; returns the number of this round.
  unsigned meet(Meeting& meeting, unsigned expected, const Call& call,
                const std::source_location& where, const void* number = nullptr) {
    std::unique_lock lock(meeting.mutex);
    if (meeting.arrived == 0) meeting.call = call;
    if (meeting.call != call) fail("others of the mask are at another call or mask", where);
    const unsigned round = meeting.round;
    if (number != nullptr) {
      std::memcpy(meeting.number[round % 2][threadIdx.x % kWarp], number, call.bytes);
    }
    if (++meeting.arrived == expected) {
      meeting.arrived = 0;
      running.fetch_add(expected - 1, std::memory_order_relaxed);
      ++meeting.round;
      lock.unlock();
      meeting.changed.notify_all();
    } else {
      one_less_running(where);  // Before the last to come can count this thread as running again.
      meeting.changed.wait(lock, [&] { return meeting.round != round; });
    }
    return round;
  }
};

inline Block* current = nullptr;

// The `number` of the thread `source` of this warp, all threads of `mask` taking part.
template <typename T>
T exchange(const char* name, unsigned mask, T number, unsigned source, unsigned width,
           const std::source_location& where) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 16);
  const unsigned first = threadIdx.x / kWarp * kWarp;
  if (!(mask >> (threadIdx.x % kWarp) & 1)) fail("the thread is not in its own mask", where);
  if (!(mask >> source & 1)) fail("it reads from a thread that is not in the mask", where);
  if (width == 0 || width > kWarp || (width & (width - 1)) != 0) fail("wrong width", where);
  const unsigned first_of_mask = first + static_cast<unsigned>(__builtin_ctz(mask));
  const unsigned last_of_mask = first + kWarp - 1 - static_cast<unsigned>(__builtin_clz(mask));
  if (last_of_mask >= current->threads) fail("the mask is larger than the block", where);
  Meeting& meeting = current->shuffles[first_of_mask];
  const Call call{name, where.line(), where.column(), mask, width, sizeof(T)};
  const unsigned round =
      current->meet(meeting, static_cast<unsigned>(__builtin_popcount(mask)), call, where, &number);
  T result;
  std::memcpy(&result, meeting.number[round % 2][source], sizeof(T));
  return result;
}

// kernel<<<blocks, threads>>>(arguments...), and waits for its end.
template <typename Kernel, typename... Arguments>
void launch(unsigned blocks, unsigned threads, Kernel kernel, const Arguments&... arguments) {
  Block block(threads);
  current = &block;
  gridDim = {blocks};
  blockDim = {threads};
  const auto restart = [&]() noexcept { block.running = block.unfinished = threads; };
  std::barrier end_of_block(threads, restart);
  std::vector<std::jthread> running;
  for (unsigned thread = 0; thread < threads; ++thread) {
    running.emplace_back([&, thread] {
      threadIdx = {thread, 0, 0};
      for (unsigned b = 0; b < blocks; ++b) {
        blockIdx = {b, 0, 0};
        kernel(arguments...);
        block.unfinished.fetch_sub(1, std::memory_order_relaxed);
        block.one_less_running(std::source_location::current());
        end_of_block.arrive_and_wait();
      }
    });
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  auto& block = *cuda_on_cpu::current;
  block.meet(block.all, block.threads, {"__syncthreads", where.line(), where.column(), 0, 0, 0},
             where);
}

inline void __syncwarp(std::source_location where = std::source_location::current()) {
  auto& block = *cuda_on_cpu::current;
  constexpr unsigned warp = cuda_on_cpu::kWarp;
  block.meet(block.shuffles[threadIdx.x / warp * warp], warp,
             {"__syncwarp", where.line(), where.column(), 0, 0, 0}, where);
}

template <typename T>
T __shfl_sync(unsigned mask, T number, int source, int width = 32,
              std::source_location where = std::source_location::current()) {
  const unsigned lane = threadIdx.x % cuda_on_cpu::kWarp;
  const unsigned from = lane / width * width + static_cast<unsigned>(source) % width;
  return cuda_on_cpu::exchange("__shfl_sync", mask, number, from, width, where);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T number, int with, int width = 32,
                  std::source_location where = std::source_location::current()) {
  const unsigned lane = threadIdx.x % cuda_on_cpu::kWarp;
  const unsigned from = lane ^ static_cast<unsigned>(with);
  const bool beyond = from >= lane / width * width + width;  // Then its own number comes back.
  return cuda_on_cpu::exchange("__shfl_xor_sync", mask, number, beyond ? lane : from, width, where);
}

template <typename T>
T atomicAdd(T* to, T amount) {
  return std::atomic_ref<T>(*to).fetch_add(amount, std::memory_order_relaxed);
}

// Each of the four by itself, as on a GPU.
inline float4 atomicAdd(float4* to, float4 amount) {
  if (reinterpret_cast<uintptr_t>(to) % alignof(float4) != 0) {
    cuda_on_cpu::fail("atomicAdd: misaligned float4", std::source_location::current());
  }
  return {atomicAdd(&to->x, amount.x), atomicAdd(&to->y, amount.y), atomicAdd(&to->z, amount.z),
          atomicAdd(&to->w, amount.w)};
}
