// The backward pass. A part of kernels_impl.h, which says what may stand here.

// Where the gradients of the pixels of a part are summed. Places are counted in numbers from the
// part's first one, as if its pixels lay side by side; they are `step` times as far apart.
template <typename scalar_t>
struct Sums {
  using L = Lanes<scalar_t>;

  typename L::real* numbers;
  int64_t step;

  // The sums += share * grad, for channels from c on of the pixel at this offset.
  template <int vectors>
  inline void add(int64_t offset, int64_t c, typename L::real share,
                  const typename L::Real (&grad)[vectors]) const {
    auto* const to = numbers + offset * step + c;
    for (int v = 0; v < vectors; ++v) {
      const auto old = load_bytes<typename L::Real>(to + v * L::count);
      store(to + v * L::count, old + share * grad[v]);
    }
  }

  inline void add_one(int64_t offset, int64_t c, typename L::real product) const {
    numbers[offset * step + c] += product;
  }
};

// The same for 16 bit types where memory is short: the upper half of the bits of each float stands
// where the result will be, the lower half in a buffer, side by side.
template <typename scalar_t>
struct HalvedSums {
  using L = Lanes<scalar_t>;

  scalar_t* upper;
  int64_t step;
  uint16_t* lower;

  template <int vectors>
  inline void add(int64_t offset, int64_t c, float share,
                  const typename L::Real (&grad)[vectors]) const {
    scalar_t* const to = upper + offset * step + c;
    uint16_t* const to_lower = lower + offset + c;
    for (int v = 0; v < vectors; v += 2) {
      typename L::Real even, odd;
      load_sums(to + v * L::count, to_lower + v * L::count, even, odd);
      even += share * grad[v];
      odd += share * grad[v + 1];
      const auto even_bits = (typename L::Bits)even;
      const auto odd_bits = (typename L::Bits)odd;
      store(to + v * L::count, even_bits >> 16 | (odd_bits & 0xffff0000));
      store(to_lower + v * L::count, (even_bits & 0xffff) | odd_bits << 16);
    }
  }

  inline void add_one(int64_t offset, int64_t c, float product) const {
    scalar_t* const to = upper + offset * step + c;
    uint16_t* const to_lower = lower + offset + c;
    const float sum = load_sum(to, to_lower) + product;
    uint32_t bits;
    __builtin_memcpy(&bits, &sum, sizeof bits);
    store(to, static_cast<uint16_t>(bits >> 16));
    *to_lower = bits;
  }

  // Replaces the sums by their rounded values.
  inline void round(int64_t tokens, int64_t channels) const {
    for (int64_t token = 0; token < tokens; ++token) {
      scalar_t* const to = upper + token * channels * step;
      const uint16_t* const to_lower = lower + token * channels;
      int64_t c = 0;
      for (; c + 2 * L::count <= channels; c += 2 * L::count) {
        typename L::Real pair[2];
        load_sums(to + c, to_lower + c, pair[0], pair[1]);
        store_channels(to + c, pair);
      }
      for (; c < channels; ++c) to[c] = static_cast<scalar_t>(load_sum(to + c, to_lower + c));
    }
  }

 private:
  static inline void load_sums(const scalar_t* upper, const uint16_t* lower, typename L::Real& even,
                               typename L::Real& odd) {
    const auto high = load_bytes<typename L::Bits>(upper);
    const auto low = load_bytes<typename L::Bits>(lower);
    even = (typename L::Real)(high << 16 | (low & 0xffff));
    odd = (typename L::Real)((high & 0xffff0000) | low >> 16);
  }

  static inline float load_sum(const scalar_t* upper, const uint16_t* lower) {
    const uint32_t bits = uint32_t{load_bytes<uint16_t>(upper)} << 16 | uint32_t{*lower};
    return load_bytes<float>(&bits);
  }
};

// What is done with one gradient of the output: the samples [begin, end) of the chunk.
// sums += share * grad_output at each corner, and the lanes of product += the products of
// grad_output and pixel, or = with the first channels, for `vectors` vectors of channels from c on.
// Pixels of value are `step` times as far apart as chunk.offset says.
template <int vectors, typename scalar_t, typename sums_t>
inline void scatter(const Chunk<scalar_t>& chunk, int64_t begin, int64_t end, const scalar_t* value,
                    int64_t step, const sums_t& sums, int64_t c, const scalar_t* grad_output,
                    typename Lanes<scalar_t>::Real (&product)[4][Chunk<scalar_t>::kSamples]) {
  using L = Lanes<scalar_t>;
  typename L::Real grad[vectors];
  load_channels(grad_output + c, grad);
  for (int64_t i = begin; i < end; ++i) {
    for (int corner = 0; corner < 4; ++corner) {
      typename L::Real sum{};
      if (c > 0) sum = product[corner][i];
      const int64_t offset = chunk.offset[corner][i];
      if (offset < 0) {
        product[corner][i] = sum;
        continue;
      }
      typename L::Real pixel[vectors];
      load_channels(value + offset * step + c, pixel);
      for (int v = 0; v < vectors; ++v) sum += grad[v] * pixel[v];
      product[corner][i] = sum;
      sums.add(offset, c, chunk.share[corner][i], grad);
    }
  }
}

// The same for all channels.
template <typename scalar_t, typename sums_t>
inline void scatter_channels(
    const Chunk<scalar_t>& chunk, int64_t begin, int64_t end, const scalar_t* value, int64_t step,
    const sums_t& sums, int64_t channels, const scalar_t* grad_output,
    typename Lanes<scalar_t>::Real (&product)[4][Chunk<scalar_t>::kSamples]) {
  using L = Lanes<scalar_t>;
  using real = typename L::real;
  int64_t c = 0;
  for (; c + 4 * L::count <= channels; c += 4 * L::count) {
    scatter<4>(chunk, begin, end, value, step, sums, c, grad_output, product);
  }
  for (; c + 2 * L::count <= channels; c += 2 * L::count) {
    scatter<2>(chunk, begin, end, value, step, sums, c, grad_output, product);
  }
  if constexpr (!L::is_narrow) {
    for (; c + L::count <= channels; c += L::count) {
      scatter<1>(chunk, begin, end, value, step, sums, c, grad_output, product);
    }
  }
  for (; c < channels; ++c) {
    const real grad = static_cast<real>(grad_output[c]);
    for (int64_t i = begin; i < end; ++i) {
      for (int corner = 0; corner < 4; ++corner) {
        if (c == 0) product[corner][i] = typename L::Real{};
        const int64_t offset = chunk.offset[corner][i];
        if (offset < 0) continue;
        product[corner][i][0] += grad * static_cast<real>(value[offset * step + c]);
        sums.add_one(offset, c, chunk.share[corner][i] * grad);
      }
    }
  }
}

// One part of the backward pass: some levels of one head of one image.
template <typename scalar_t, typename location_t, typename sums_t>
inline void backward_part(const Call& call, const Plan<scalar_t>& plan, int64_t first_sample,
                          int64_t image, int64_t head, const scalar_t* value, int64_t step,
                          const sums_t& sums) {
  using L = Lanes<scalar_t>;
  constexpr int kSamples = Chunk<scalar_t>::kSamples;
  constexpr int64_t kQueriesAhead = 8;
  const int64_t stride = call.heads * call.channels;
  const int64_t head_samples = call.levels * call.points;
  const int64_t query_samples = call.heads * head_samples;
  const int64_t all_samples = call.batch * call.queries * query_samples;
  Chunk<scalar_t> chunk;
  typename L::Real product[4][kSamples] = {};
  typename L::real grads[2 * kSamples], grad_attention[kSamples];
  // Of several queries, so that vectors are full where one has few samples.
  location_t near_locations[2 * kSamples] = {}, near_weights[kSamples] = {};
  for (int64_t query = 0; query < call.queries; query += plan.queries) {
    const int64_t left = call.queries - query;
    const int64_t queries = left < plan.queries ? left : plan.queries;
    const int64_t row = image * call.queries + query;
    const int64_t sample = row * query_samples + head * head_samples + first_sample;
    const auto* grad_output =
        static_cast<const scalar_t*>(call.grad_output) + row * stride + head * call.channels;
    const auto* locations = static_cast<const location_t*>(call.locations) + sample * 2;
    const auto* weights = static_cast<const location_t*>(call.weights) + sample;
    int64_t readable = all_samples - sample;
    if (plan.queries > 1) {
      copy_rows(queries, 2 * plan.samples, locations, 2 * query_samples, near_locations,
                2 * plan.samples);
      copy_rows(queries, plan.samples, weights, query_samples, near_weights, plan.samples);
      locations = near_locations;
      weights = near_weights;
      readable = kSamples;
    }
    const int64_t end = queries * plan.samples;
    for (int64_t first = 0; first < end; first += kSamples) {
      chunk.fill(plan, first, end, locations, weights, readable);
      const int groups = (chunk.count + L::count - 1) / L::count;
      const int64_t row_samples = queries > 1 ? plan.samples : chunk.count;
      for (int64_t q = 0; q < queries; ++q) {
        // The rows of a head's queries lie too far apart for the processor to do that by itself.
        const int64_t ahead = query + q + kQueriesAhead < call.queries ? q + kQueriesAhead : q;
        const int64_t at = sample + ahead * query_samples;
        prefetch<0>(grad_output + ahead * stride, call.channels);
        prefetch<0>(static_cast<const location_t*>(call.locations) + 2 * at, 2 * plan.samples);
        prefetch<0>(static_cast<const location_t*>(call.weights) + at, plan.samples);
        prefetch<1>(static_cast<location_t*>(call.grad_locations) + 2 * at, 2 * plan.samples);
        prefetch<1>(static_cast<location_t*>(call.grad_weights) + at, plan.samples);
        scatter_channels(chunk, q * row_samples, (q + 1) * row_samples, value, step, sums,
                         call.channels, grad_output + q * stride, product);
      }
      for (int group = 0; group < groups; ++group) {
        typename L::Real corner_products[4];
        for (int corner = 0; corner < 4; ++corner) {
          typename L::Real lanes[L::count];
          for (int i = 0; i < L::count; ++i) lanes[i] = product[corner][group * L::count + i];
          corner_products[corner] = sum_lanes<scalar_t>(lanes);
        }
        const auto& levels = plan.groups[first / L::count + group];
        const auto grad = sample_gradient(chunk.corners[group], chunk.attention[group],
                                          levels.width, levels.height, corner_products);
        for (int i = 0; i < L::count; ++i) {
          grads[2 * (group * L::count + i)] = grad.x[i];
          grads[2 * (group * L::count + i) + 1] = grad.y[i];
        }
        store(grad_attention + group * L::count, grad.attention);
      }
      const int64_t at = sample + first;
      copy_rows(queries, 2 * row_samples, grads, 2 * row_samples,
                static_cast<location_t*>(call.grad_locations) + 2 * at, 2 * query_samples);
      copy_rows(queries, row_samples, grad_attention, row_samples,
                static_cast<location_t*>(call.grad_weights) + at, query_samples);
    }
  }
}

template <typename scalar_t, typename location_t>
void backward(const Call& call, int64_t begin, int64_t end) {
  using L = Lanes<scalar_t>;
  const int64_t stride = call.heads * call.channels;
  const int64_t heads = call.batch * call.heads;
  for (int64_t part = begin; part < end; ++part) {
    const int64_t image = part % heads / call.heads;
    const int64_t head = part % call.heads;
    const int64_t first_level = part / heads;
    const int64_t levels = call.by_level ? 1 : call.levels;
    const int64_t samples = levels * call.points;
    // So many that vectors are full.
    const int64_t queries = samples % L::count == 0 ? 1 : Chunk<scalar_t>::kSamples / samples;
    const Plan<scalar_t> plan(call, first_level, first_level + levels, queries > 0 ? queries : 1,
                              call.channels);
    const int64_t first_number =
        (image * call.tokens + plan.skipped_tokens) * stride + head * call.channels;
    const int64_t numbers = plan.tokens * call.channels;
    const auto* value = static_cast<const scalar_t*>(call.value) + first_number;
    auto* grad_value = static_cast<scalar_t*>(call.grad_value) + first_number;

    const int64_t first_sample = first_level * call.points;
    if (call.copied) {
      const Buffer<scalar_t> copy(numbers);
      copy_rows(plan.tokens, call.channels, value, stride, copy.numbers, call.channels);
      const Buffer<typename L::real> sums(numbers);
      backward_part<scalar_t, location_t>(call, plan, first_sample, image, head, copy.numbers, 1,
                                          Sums<scalar_t>{sums.numbers, 1});
      for (int64_t token = 0; token < plan.tokens; ++token) {
        store_sums(sums.numbers + token * call.channels, call.channels,
                   grad_value + token * stride);
      }
    } else if constexpr (L::is_narrow) {
      const Buffer<uint16_t> lower(numbers);
      const HalvedSums<scalar_t> sums{grad_value, call.heads, lower.numbers};
      backward_part<scalar_t, location_t>(call, plan, first_sample, image, head, value, call.heads,
                                          sums);
      sums.round(plan.tokens, call.channels);
    } else {
      const Sums<scalar_t> sums{grad_value, call.heads};
      backward_part<scalar_t, location_t>(call, plan, first_sample, image, head, value, call.heads,
                                          sums);
    }
  }
}
