// The backward pass. A part of kernels_impl.h, which says what may stand here.

// grad_value[c] += share * grad_output[c] at each corner, and the lanes of product += the products
// of grad_output and pixel, for `vectors` vectors of channels. A pixel of value lies `step` times
// as far from the head's first one as its gradient does.
template <int vectors, typename scalar_t>
inline void scatter(const Chunk<scalar_t>& chunk, const scalar_t* value, int64_t step,
                    typename Lanes<scalar_t>::real* grad_value, const scalar_t* grad_output,
                    typename Lanes<scalar_t>::Real (&product)[4][Chunk<scalar_t>::kSamples]) {
  using L = Lanes<scalar_t>;
  typename L::Real grad[vectors];
  for (int v = 0; v < vectors; ++v) grad[v] = load(grad_output + v * L::count);
  for (int i = 0; i < chunk.count; ++i) {
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t offset = chunk.offset[corner][i];
      if (offset < 0) continue;
      const scalar_t* pixel = value + offset * step;
      typename L::real* grad_pixel = grad_value + offset;
      const auto share = chunk.share[corner][i];
      typename L::Real sum = product[corner][i];
      for (int v = 0; v < vectors; ++v) {
        sum += grad[v] * load(pixel + v * L::count);
        const auto old = load_bytes<typename L::Real>(grad_pixel + v * L::count);
        store(grad_pixel + v * L::count, old + share * grad[v]);
      }
      product[corner][i] = sum;
    }
  }
}

// One part of the backward pass: some levels of one head of one image. The gradients of the pixels
// go to grad_value, `stride` numbers apart.
template <typename scalar_t, typename location_t>
inline void backward_part(const Call& call, const Plan<scalar_t>& plan, int64_t first_sample,
                          int64_t image, int64_t head, int64_t stride,
                          typename Lanes<scalar_t>::real* grad_value) {
  using L = Lanes<scalar_t>;
  using real = typename L::real;
  const int64_t value_stride = call.heads * call.channels;
  const int64_t step = value_stride / stride;
  const int64_t all_samples = call.levels * call.points;
  const int64_t rows = call.batch * call.queries * call.heads;
  const auto* value = static_cast<const scalar_t*>(call.value) +
                      (image * call.tokens + plan.skipped_tokens) * value_stride +
                      head * call.channels;
  Chunk<scalar_t> chunk;
  typename L::Real product[4][Chunk<scalar_t>::kSamples];
  for (int64_t query = 0; query < call.queries; ++query) {
    const int64_t row = (image * call.queries + query) * call.heads + head;
    const auto* grad_output = static_cast<const scalar_t*>(call.grad_output) + row * call.channels;
    const int64_t sample = row * all_samples + first_sample;
    const auto* locations = static_cast<const location_t*>(call.locations) + sample * 2;
    const auto* weights = static_cast<const location_t*>(call.weights) + sample;
    auto* grad_locations = static_cast<location_t*>(call.grad_locations) + sample * 2;
    auto* grad_weights = static_cast<location_t*>(call.grad_weights) + sample;
    for (int64_t first = 0; first < plan.samples; first += chunk.kSamples) {
      chunk.fill(plan, first, locations, weights, rows * all_samples - sample, stride);
      const int groups = (chunk.count + L::count - 1) / L::count;
      for (int corner = 0; corner < 4; ++corner) {
        for (int i = 0; i < groups * L::count; ++i) product[corner][i] = typename L::Real{};
      }
      int64_t c = 0;
      for (; c + 4 * L::count <= call.channels; c += 4 * L::count) {
        scatter<4>(chunk, value + c, step, grad_value + c, grad_output + c, product);
      }
      for (; c + 2 * L::count <= call.channels; c += 2 * L::count) {
        scatter<2>(chunk, value + c, step, grad_value + c, grad_output + c, product);
      }
      for (; c + L::count <= call.channels; c += L::count) {
        scatter<1>(chunk, value + c, step, grad_value + c, grad_output + c, product);
      }
      for (; c < call.channels; ++c) {
        const real grad = static_cast<real>(grad_output[c]);
        for (int i = 0; i < chunk.count; ++i) {
          for (int corner = 0; corner < 4; ++corner) {
            const int64_t offset = chunk.offset[corner][i];
            if (offset < 0) continue;
            product[corner][i][0] += grad * static_cast<real>(value[offset * step + c]);
            grad_value[offset + c] += chunk.share[corner][i] * grad;
          }
        }
      }
      for (int group = 0; group < groups; ++group) {
        typename L::Real sums[4];
        for (int corner = 0; corner < 4; ++corner) {
          typename L::Real lanes[L::count];
          for (int i = 0; i < L::count; ++i) lanes[i] = product[corner][group * L::count + i];
          sums[corner] = sum_lanes<scalar_t>(lanes);
        }
        const auto& levels = plan.groups[first / L::count + group];
        const auto grad = sample_gradient(chunk.corners[group], chunk.attention[group],
                                          levels.width, levels.height, sums);
        const int begin = group * L::count;
        const int end = begin + L::count < chunk.count ? begin + L::count : chunk.count;
        for (int i = begin; i < end; ++i) {
          grad_locations[2 * (first + i)] = static_cast<location_t>(grad.x[i - begin]);
          grad_locations[2 * (first + i) + 1] = static_cast<location_t>(grad.y[i - begin]);
          grad_weights[first + i] = static_cast<location_t>(grad.attention[i - begin]);
        }
      }
    }
  }
}

template <typename scalar_t, typename location_t>
void backward(const Call& call, int64_t begin, int64_t end, bool by_level) {
  using real = typename Lanes<scalar_t>::real;
  const int64_t stride = call.heads * call.channels;
  const int64_t parts = by_level ? call.levels : 1;
  for (int64_t part = begin; part < end; ++part) {
    const int64_t image = part / parts / call.heads;
    const int64_t head = part / parts % call.heads;
    const int64_t first_level = by_level ? part % parts : 0;
    const Plan<scalar_t> plan(call, first_level, by_level ? first_level + 1 : call.levels);
    const int64_t first_sample = first_level * call.points;
    auto* grad_value = static_cast<scalar_t*>(call.grad_value) +
                       (image * call.tokens + plan.skipped_tokens) * stride + head * call.channels;
    if constexpr (sizeof(scalar_t) < sizeof(real)) {  // sums of 16 bit numbers are made in float
      real* const sums = new real[plan.tokens * call.channels]();
      backward_part<scalar_t, location_t>(call, plan, first_sample, image, head, call.channels,
                                          sums);
      for (int64_t token = 0; token < plan.tokens; ++token) {
        for (int64_t c = 0; c < call.channels; ++c) {
          grad_value[token * stride + c] = static_cast<scalar_t>(sums[token * call.channels + c]);
        }
      }
      delete[] sums;
    } else {
      backward_part<scalar_t, location_t>(call, plan, first_sample, image, head, stride,
                                          grad_value);
    }
  }
}
