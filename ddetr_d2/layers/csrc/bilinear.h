// One bilinear sample, forward and backward: the arithmetic that all kernels share.
//
// `real` and `integer` are a floating point and an integer type, or vectors of such (GCC's vector
// extension) with one sample in each lane.
#pragma once

#include <type_traits>

#if defined(__CUDACC__)
#define DDETR_D2_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DDETR_D2_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace ddetr_d2 {

template <typename to, typename from>
DDETR_D2_HOST_DEVICE to convert(from x) {
#if !defined(__CUDACC__)
  if constexpr (!std::is_arithmetic_v<to>)
    return __builtin_convertvector(x, to);
  else
#endif
    return static_cast<to>(x);
}

// The four pixels around a sample: left top, right top, left bottom, right bottom.
template <typename real, typename integer>
struct Corners {
  integer place[4];  // of the pixel; negative for one outside, which counts as zero
  real right;        // share of the right column in the sample, 0 to 1
  real bottom;       // share of the bottom row

  DDETR_D2_HOST_DEVICE real share(int corner) const {
    const real x = corner % 2 == 0 ? 1 - right : right;
    const real y = corner / 2 == 0 ? 1 - bottom : bottom;
    return x * y;
  }
};

// Where the pixels of a level are: the first one's place, and how far the next row and the next
// column are from there.
template <typename integer>
struct Layout {
  integer columns, rows;
  integer first, row_step, column_step;
};

// Finds the corners of the sample at the normalised location (loc_x, loc_y) of a level. All are
// outside if it is dropped: too far away, infinite or NaN.
template <typename real, typename integer>
DDETR_D2_HOST_DEVICE Corners<real, integer> find_corners(real loc_x, real loc_y, real width,
                                                         real height,
                                                         const Layout<integer>& layout) {
  real x = loc_x * width - 0.5f;
  real y = loc_y * height - 0.5f;
  const auto near = (x > -1) & (x < width) & (y > -1) & (y < height);
  // Only after that test is it safe to convert to an integer. -2 has no neighbour inside.
  x = near ? x : real{} - 2;
  y = near ? y : real{} - 2;
  integer left = convert<integer>(x);
  integer top = convert<integer>(y);
  left = convert<real>(left) > x ? left - 1 : left;
  top = convert<real>(top) > y ? top - 1 : top;

  Corners<real, integer> corners;
  corners.right = x - convert<real>(left);
  corners.bottom = y - convert<real>(top);
  const auto left_inside = left >= 0;
  const auto right_inside = (left >= -1) & (left + 1 < layout.columns);
  const auto top_inside = top >= 0;
  const auto bottom_inside = (top >= -1) & (top + 1 < layout.rows);
  const integer outside = integer{} - 1;
  const integer place = layout.first + top * layout.row_step + left * layout.column_step;
  const integer below = place + layout.row_step;
  corners.place[0] = left_inside & top_inside ? place : outside;
  corners.place[1] = right_inside & top_inside ? place + layout.column_step : outside;
  corners.place[2] = left_inside & bottom_inside ? below : outside;
  corners.place[3] = right_inside & bottom_inside ? below + layout.column_step : outside;
  return corners;
}

// Gradients of one sample's location and attention weight.
template <typename real>
struct SampleGrad {
  real x;
  real y;
  real attention;
};

// `product` has the scalar product of the output's gradient with each corner's pixel, zero for
// corners outside.
template <typename real, typename integer>
DDETR_D2_HOST_DEVICE SampleGrad<real> sample_gradient(const Corners<real, integer>& corners,
                                                      real attention, real width, real height,
                                                      const real (&product)[4]) {
  // A sample without pixels has no gradient, also where its weight is infinite or NaN. The sign of
  // the conjunction says whether all places are negative.
  const auto inside =
      (corners.place[0] & corners.place[1] & corners.place[2] & corners.place[3]) >= 0;
  attention = inside ? attention : real{};
  const real slope_top = product[1] - product[0];
  const real slope_bottom = product[3] - product[2];
  const real slope_left = product[2] - product[0];
  const real slope_right = product[3] - product[1];
  SampleGrad<real> grad;
  grad.x = attention * width * (slope_top + corners.bottom * (slope_bottom - slope_top));
  grad.y = attention * height * (slope_left + corners.right * (slope_right - slope_left));
  grad.attention = corners.share(0) * product[0] + corners.share(1) * product[1] +
                   corners.share(2) * product[2] + corners.share(3) * product[3];
  return grad;
}

}  // namespace ddetr_d2
