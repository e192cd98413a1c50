// Runs the CUDA kernels of one case on a CPU: cuda_on_cpu CASE RESULT. What the two files have in
// them stands in test_cuda_on_cpu.py.
#include "cuda_on_cpu.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <fstream>
// After that, since other headers look for it too.
#define __CUDA_ARCH__ TEST_CUDA_ARCH
#include "cuda/kernels.cuh"

namespace {

using ddetr_d2::CudaCall;
using ddetr_d2::Levels;

struct Case {
  int32_t value_type, location_type, threads, most_blocks;
  int32_t batch, heads, channels, queries, levels, points, multiprocessors;
  int32_t sizes[2 * ddetr_d2::kMaxLevels];
};

// Exactly as large as needed, so that the address sanitizer sees the ends, and NaN until written.
template <typename T>
struct Array {
  explicit Array(int64_t size, double fill = NAN) : size(size), at(new T[size]) {
    for (int64_t i = 0; i < size; ++i) at[i] = static_cast<T>(fill);
  }
  Array(int64_t size, std::ifstream& file) : Array(size) {
    file.read(reinterpret_cast<char*>(at.get()), size * sizeof(T));
  }
  void write(std::ofstream& file) const {
    file.write(reinterpret_cast<const char*>(at.get()), size * sizeof(T));
  }
  int64_t size;
  std::unique_ptr<T[]> at;
};

// `reference` is what the locations are offsets from, if kReference is not 0.
template <int kReference, int kVector, typename scalar_t, typename acc_t, typename location_t>
void run_forward(const Case& c, const CudaCall& call, const Levels& levels,
                 const Array<scalar_t>& value, const Array<acc_t>& reference,
                 const Array<location_t>& locations, const Array<location_t>& weights,
                 std::ofstream& out) {
  Array<scalar_t> output(call.batch * c.queries * c.heads * c.channels);
  cuda_on_cpu::launch(static_cast<unsigned>(ddetr_d2::forward_blocks(call, c.threads)), c.threads,
                      ddetr_d2::forward_kernel<scalar_t, acc_t, location_t, kVector, kReference>,
                      call, levels, value.at.get(), reference.at.get(), locations.at.get(),
                      weights.at.get(), output.at.get());
  output.write(out);
}

template <typename scalar_t, typename acc_t, typename location_t, int kVector>
void run(const Case& c, const CudaCall& call, const Levels& levels, std::ifstream& in,
         std::ofstream& out) {
  const int64_t values = call.batch * call.tokens * c.heads * c.channels;
  const int64_t queries = call.batch * c.queries * c.heads;
  const int64_t samples = queries * c.levels * c.points;
  const Array<scalar_t> value(values, in);
  const Array<location_t> locations(2 * samples, in), weights(samples, in);
  const Array<scalar_t> grad_output(queries * c.channels, in);
  const int64_t references = call.batch * c.queries * c.levels;
  const Array<acc_t> points(2 * references, in), boxes(4 * references, in);
  if (!in) throw std::runtime_error("the case is cut short");
  const auto blocks = [&](int64_t items) {
    const unsigned wanted = ddetr_d2::backward_blocks(items, call.group, c.threads);
    return static_cast<unsigned>(min(static_cast<int>(wanted), c.most_blocks));
  };

  run_forward<0, kVector>(c, call, levels, value, points, locations, weights, out);
  run_forward<2, kVector>(c, call, levels, value, points, locations, weights, out);
  run_forward<4, kVector>(c, call, levels, value, boxes, locations, weights, out);

  for (const bool in_order : {false, true}) {
    Array<acc_t> grad_value(values, 0);
    Array<location_t> grad_locations(2 * samples), grad_weights(samples);
    cuda_on_cpu::launch(
        blocks(call.batch * c.heads * (in_order ? c.levels : c.queries)), c.threads,
        in_order ? ddetr_d2::backward_kernel<scalar_t, acc_t, location_t, kVector, true>
                 : ddetr_d2::backward_kernel<scalar_t, acc_t, location_t, kVector, false>,
        call, levels, grad_output.at.get(), value.at.get(), locations.at.get(), weights.at.get(),
        grad_value.at.get(), grad_locations.at.get(), grad_weights.at.get());
    grad_value.write(out);
    grad_locations.write(out);
    grad_weights.write(out);
  }
}

// Types as in test_cuda_on_cpu.py. The vector's length is a template's argument.
template <typename scalar_t, typename acc_t, typename location_t>
void dispatch_vector(const Case& c, const CudaCall& call, const Levels& levels, int vector,
                     std::ifstream& in, std::ofstream& out) {
  constexpr int wide = 16 / sizeof(scalar_t);
  if (vector == wide) return run<scalar_t, acc_t, location_t, wide>(c, call, levels, in, out);
  if constexpr (sizeof(scalar_t) == 2) {
    if (vector == wide / 2) {
      return run<scalar_t, acc_t, location_t, wide / 2>(c, call, levels, in, out);
    }
  }
  if (vector == 1) return run<scalar_t, acc_t, location_t, 1>(c, call, levels, in, out);
  throw std::runtime_error("there is no kernel for vectors of this length");
}

template <typename scalar_t, typename acc_t>
void dispatch(const Case& c, const CudaCall& call, const Levels& levels, int vector,
              std::ifstream& in, std::ofstream& out) {
  if (c.location_type == c.value_type) {
    dispatch_vector<scalar_t, acc_t, scalar_t>(c, call, levels, vector, in, out);
  } else {
    dispatch_vector<scalar_t, acc_t, acc_t>(c, call, levels, vector, in, out);
  }
}

}  // namespace

int main(int, char** arguments) {
  std::ifstream in(arguments[1], std::ios::binary);
  std::ofstream out(arguments[2], std::ios::binary);
  Case c;
  in.read(reinterpret_cast<char*>(&c), sizeof c);
  Levels levels{};
  int32_t tokens = 0;
  for (int l = 0; l < c.levels; ++l) {
    levels.rows[l] = c.sizes[2 * l];
    levels.columns[l] = c.sizes[2 * l + 1];
    levels.first_token[l] = tokens;
    tokens += levels.rows[l] * levels.columns[l];
  }
  const int bytes = c.value_type == 0 ? 4 : c.value_type == 1 ? 8 : 2;
  const int vector = ddetr_d2::vector_for(c.channels, bytes);
  CudaCall call{c.batch,   tokens,   c.heads,  c.channels,
                c.queries, c.levels, c.points, ddetr_d2::group_for(c.channels, vector)};
  ddetr_d2::set_forward_bits(call, bytes, c.multiprocessors);
  if (c.value_type == 0) dispatch<float, float>(c, call, levels, vector, in, out);
  if (c.value_type == 1) dispatch<double, double>(c, call, levels, vector, in, out);
  if (c.value_type == 2) dispatch<c10::Half, float>(c, call, levels, vector, in, out);
  if (c.value_type == 3) dispatch<c10::BFloat16, float>(c, call, levels, vector, in, out);
  return out.flush() ? 0 : 1;
}
