// The kernels as the dispatch sees them: the same sources, compiled for several kinds of
// processors.
#pragma once

#include <cstdint>

namespace ddetr_d2 {

// One call of the operator. All tensors are contiguous.
struct Call {
  int64_t batch, tokens, heads, channels, queries, levels, points;
  const int64_t* spatial_shapes;  // height and width of each level
  const void* value;
  const void* locations;
  const void* weights;
  // Where these are given, `locations` has offsets from them, and `weights` numbers whose softmax
  // over the samples of a head is meant: reference points or boxes (N, Q, L, 2 or 4), of the type
  // in which values are summed.
  const void* reference;
  int64_t reference_size;
  void* output;
  const void* grad_output;
  void* grad_value;  // zero at first, unless copied
  void* grad_locations;
  void* grad_weights;
  bool by_level;  // a part of the backward pass is a level of a head instead of a whole head
  bool copied;    // its pixels, and the sums of their gradients, lie side by side in buffers
};

enum class Type { kFloat, kDouble, kHalf, kBFloat16 };

struct Kernels {
  // The rows [begin, end) of the output: those of all queries for the first head of the first
  // image, those for the second head, and so on.
  void (*forward)(const Call& call, int64_t begin, int64_t end);
  // The parts [begin, end): a part is a head of an image, or a level of a head, all first levels
  // before all second ones. Each has pixels of its own and adds to them in the order of the
  // queries, so that the result does not depend on the number of threads.
  void (*backward)(const Call& call, int64_t begin, int64_t end);
};

// Kernels for values of one type, with locations and weights of the same type or, where values
// have 16 bits, of float.
namespace baseline {
Kernels find_kernels(Type value, Type locations);
}
#if defined(__x86_64__)
namespace avx2 {
Kernels find_kernels(Type value, Type locations);
}
namespace avx512 {
Kernels find_kernels(Type value, Type locations);
}
#endif

}  // namespace ddetr_d2
