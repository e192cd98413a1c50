// The operators' schemas. Loading the library registers them, and the CPU kernels, with PyTorch.
#include <torch/csrc/stable/library.h>

// spatial_shapes is [H0, W0, H1, W1, ...]: ints rather than a tensor, so that nobody has to wait
// for a GPU to learn a shape. The first token of each level follows from it.
STABLE_TORCH_LIBRARY(ddetr_d2, m) {
  m.def(
      "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> Tensor");
  // The same from what the linear layers give: offsets from reference points (N, Q, L, 2) or boxes
  // (N, Q, L, 4), and numbers whose softmax over the samples of a head are the weights. Without
  // gradients.
  m.def(
      "ms_deform_attn_fused(Tensor value, SymInt[] spatial_shapes, Tensor reference_points, "
      "Tensor sampling_offsets, Tensor attention_logits) -> Tensor");
  // `deterministic` asks for the same bits every time on a GPU too.
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
      "Tensor sampling_locations, Tensor attention_weights, bool deterministic=False) "
      "-> (Tensor, Tensor, Tensor)");
  // Numbers, negative ones zero with `relu`, become zero with probability p, others are divided by
  // 1 - p; then the residual is added. Which become zero is a function of the seed.
  m.def(
      "dropout(Tensor input, float p, int seed, Tensor? residual=None, bool relu=False) -> Tensor");
  m.def(
      "dropout_(Tensor(a!) input, float p, int seed, Tensor? residual=None, bool relu=False) "
      "-> Tensor(a!)");
}
