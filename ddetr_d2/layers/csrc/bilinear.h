// One bilinear sample, forward and backward: the arithmetic that all kernels share.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define DDETR_D2_HOST_DEVICE __host__ __device__ inline
#else
#define DDETR_D2_HOST_DEVICE inline
#endif

namespace ddetr_d2 {

// One of the four pixels around a sample.
template <typename acc_t>
struct Corner {
  int64_t token;    // index within the level; -1 for a pixel outside, which counts as zero
  acc_t weight;     // its share in the sample
  acc_t weight_dx;  // derivative of the share by the normalised x of the location
  acc_t weight_dy;  // and by y
};

// Gradients of one sample's location and attention weight.
template <typename acc_t>
struct SampleGrad {
  acc_t x = 0;
  acc_t y = 0;
  acc_t attention = 0;
};

// Finds the corners of the sample at the normalised location (loc_x, loc_y). False if it is
// dropped: too far outside, infinite or NaN. Only after that test is it safe to convert to an
// integer.
template <typename acc_t>
DDETR_D2_HOST_DEVICE bool find_corners(acc_t loc_x, acc_t loc_y, int64_t height, int64_t width,
                                       Corner<acc_t> (&corners)[4]) {
  const acc_t x = loc_x * static_cast<acc_t>(width) - acc_t(0.5);
  const acc_t y = loc_y * static_cast<acc_t>(height) - acc_t(0.5);
  if (!(x > acc_t(-1) && x < static_cast<acc_t>(width) && y > acc_t(-1) &&
        y < static_cast<acc_t>(height))) {
    return false;
  }
  const acc_t x_floor = std::floor(x);
  const acc_t y_floor = std::floor(y);
  const int64_t left = static_cast<int64_t>(x_floor);
  const int64_t top = static_cast<int64_t>(y_floor);
  const acc_t share_x[2] = {acc_t(1) - (x - x_floor), x - x_floor};
  const acc_t share_y[2] = {acc_t(1) - (y - y_floor), y - y_floor};
  const acc_t slope_x[2] = {-static_cast<acc_t>(width), static_cast<acc_t>(width)};
  const acc_t slope_y[2] = {-static_cast<acc_t>(height), static_cast<acc_t>(height)};
  for (int i = 0; i < 4; ++i) {
    const int right = i % 2;
    const int below = i / 2;
    const int64_t column = left + right;
    const int64_t row = top + below;
    const bool inside = column >= 0 && column < width && row >= 0 && row < height;
    corners[i].token = inside ? row * width + column : -1;
    corners[i].weight = share_x[right] * share_y[below];
    corners[i].weight_dx = slope_x[right] * share_y[below];
    corners[i].weight_dy = share_x[right] * slope_y[below];
  }
  return true;
}

// output[c] += attention * sample[c]. `level` points to the first of the channels in the level's
// first token, `stride` is the distance from one token to the next.
template <typename scalar_t, typename acc_t>
DDETR_D2_HOST_DEVICE void sample_forward(const scalar_t* level, int64_t stride,
                                         const Corner<acc_t> (&corners)[4], acc_t attention,
                                         int64_t channels, acc_t* output) {
  for (const Corner<acc_t>& corner : corners) {
    if (corner.token < 0) continue;
    const scalar_t* pixel = level + corner.token * stride;
    const acc_t share = attention * corner.weight;
    for (int64_t c = 0; c < channels; ++c) {
      output[c] += share * static_cast<acc_t>(pixel[c]);
    }
  }
}

// Adds the gradients that grad_output[c] gives to the sampled pixels, by way of
// add(address, gradient), and to the location and the attention weight of the sample. The latter
// two are sums over channels, so callers that split the channels have to sum what they get.
template <typename scalar_t, typename acc_t, typename Add>
DDETR_D2_HOST_DEVICE void sample_backward(const scalar_t* level, acc_t* grad_level, int64_t stride,
                                          const Corner<acc_t> (&corners)[4], acc_t attention,
                                          int64_t channels, const acc_t* grad_output, Add add,
                                          SampleGrad<acc_t>& grad) {
  for (const Corner<acc_t>& corner : corners) {
    if (corner.token < 0) continue;
    const scalar_t* pixel = level + corner.token * stride;
    acc_t* grad_pixel = grad_level + corner.token * stride;
    const acc_t share = attention * corner.weight;
    acc_t product = 0;
#if !defined(__CUDACC__)
#pragma omp simd reduction(+ : product)
#endif
    for (int64_t c = 0; c < channels; ++c) {
      add(grad_pixel + c, share * grad_output[c]);
      product += grad_output[c] * static_cast<acc_t>(pixel[c]);
    }
    grad.attention += corner.weight * product;
    grad.x += attention * corner.weight_dx * product;
    grad.y += attention * corner.weight_dy * product;
  }
}

}  // namespace ddetr_d2
