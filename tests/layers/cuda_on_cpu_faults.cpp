// Kernels with mistakes that cuda_on_cpu.h and the sanitizers have to notice, and one without:
// cuda_on_cpu_faults NUMBER. The mistakes' names stand in test_cuda_on_cpu.py.
#include "cuda_on_cpu.h"

namespace {

constexpr int kThreads = 64;

// Each thread reads what another one has written.
template <bool with_barrier>
__global__ void share_kernel(int* result) {
  __shared__ int shared[kThreads];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (with_barrier) __syncthreads();
  result[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

// The sum over groups of eight threads; `group` and `skipped` make it go wrong.
template <int group, int skipped>
__global__ void sum_kernel(int* result) {
  const unsigned mask = ((1u << group) - 1) << (threadIdx.x % 32 / 8 * 8);
  int sum = static_cast<int>(threadIdx.x);
  for (int distance = 4; distance > 0; distance /= 2) {
    if (threadIdx.x != skipped) sum += __shfl_xor_sync(mask, sum, distance, 8);
  }
  result[threadIdx.x] = sum;
}

// Half of each group is at another call.
__global__ void two_calls_kernel(int* result) {
  const unsigned mask = 0xffu << (threadIdx.x % 32 / 8 * 8);
  const int mine = static_cast<int>(threadIdx.x);
  if (threadIdx.x % 8 < 4) {
    result[threadIdx.x] = __shfl_sync(mask, mine, 0, 8);
  } else {
    result[threadIdx.x] = __shfl_sync(mask, mine, 1, 8);
  }
}

// The first half of the threads returns before the barrier.
__global__ void early_return_kernel(int* result) {
  if (threadIdx.x < kThreads / 2) return;
  __syncthreads();
  result[threadIdx.x] = 1;
}

__global__ void beyond_the_end_kernel(int* result) { result[threadIdx.x + 1] = 1; }

__global__ void plain_sum_kernel(int* result) { *result += 1; }

__global__ void misaligned_kernel(int* result) {
  if (threadIdx.x == 0) *reinterpret_cast<float4*>(result + 1) = make_float4(1, 2, 3, 4);
}

}  // namespace

int main(int, char** arguments) {
  const std::unique_ptr<int[]> result(new int[kThreads]{});
  const auto run = [&](auto kernel) { cuda_on_cpu::launch(2, kThreads, kernel, result.get()); };
  switch (std::atoi(arguments[1])) {
    case 0: {
      run(share_kernel<true>);
      bool right = true;
      for (int i = 0; i < kThreads; ++i) right = right && result[i] == kThreads - 1 - i;
      run(sum_kernel<8, -1>);
      for (int i = 0; i < kThreads; ++i) right = right && result[i] == i / 8 * 64 + 28;
      return right ? 0 : 1;
    }
    case 1:
      run(share_kernel<false>);
      break;
    case 2:
      run(sum_kernel<8, 21>);
      break;
    case 3:
      run(sum_kernel<7, -1>);
      break;
    case 4:
      run(sum_kernel<9, -1>);
      break;
    case 5:
      run(two_calls_kernel);
      break;
    case 6:
      run(early_return_kernel);
      break;
    case 7:
      run(beyond_the_end_kernel);
      break;
    case 8:
      run(plain_sum_kernel);
      break;
    case 9:
      run(misaligned_kernel);
      break;
  }
  return 0;
}
