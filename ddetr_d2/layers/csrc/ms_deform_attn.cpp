// The operators' schemas, and the Python module whose import registers everything in this folder.
#include <Python.h>
#include <torch/library.h>

// spatial_shapes is [H0, W0, H1, W1, ...]: ints rather than a tensor, so that nobody has to wait
// for a GPU to learn a shape. The first token of each level follows from it.
TORCH_LIBRARY(ddetr_d2, m) {
  m.def(
      "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> Tensor");
  // The same from what the linear layers give: offsets from reference points (N, Q, L, 2) or boxes
  // (N, Q, L, 4), and numbers whose softmax over the samples of a head are the weights. Without
  // gradients.
  m.def(
      "ms_deform_attn_fused(Tensor value, SymInt[] spatial_shapes, Tensor reference_points, "
      "Tensor sampling_offsets, Tensor attention_logits) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
      "Tensor sampling_locations, Tensor attention_weights) -> (Tensor, Tensor, Tensor)");
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
