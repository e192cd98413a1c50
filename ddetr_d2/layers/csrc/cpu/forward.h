// The forward pass. A part of kernels_impl.h, which says what may stand here.

// sum[c] += share * pixel[c] over the chunk, for `vectors` vectors of channels.
template <int vectors, bool all_inside, typename scalar_t>
inline void gather_vectors(const Chunk<scalar_t>& chunk, const scalar_t* value,
                           typename Lanes<scalar_t>::real* sum) {
  using L = Lanes<scalar_t>;
  // Two sums, since an addition has to wait for the one before.
  typename L::Real top[vectors], bottom[vectors];
  for (int v = 0; v < vectors; ++v) {
    top[v] = load_bytes<typename L::Real>(sum + v * L::count);
    bottom[v] = typename L::Real{};
  }
  for (int i = 0; i < chunk.count; ++i) {
    for (int corner = 0; corner < 2; ++corner) {
      const int64_t above = chunk.offset[corner][i];
      const int64_t below = chunk.offset[corner + 2][i];
      typename L::Real pixel[vectors];
      if (all_inside || above >= 0) {
        load_channels(value + above, pixel);
        for (int v = 0; v < vectors; ++v) top[v] += chunk.share[corner][i] * pixel[v];
      }
      if (all_inside || below >= 0) {
        load_channels(value + below, pixel);
        for (int v = 0; v < vectors; ++v) bottom[v] += chunk.share[corner + 2][i] * pixel[v];
      }
    }
  }
  for (int v = 0; v < vectors; ++v) store(sum + v * L::count, top[v] + bottom[v]);
}

template <int vectors, typename scalar_t>
inline void gather(const Chunk<scalar_t>& chunk, const scalar_t* value,
                   typename Lanes<scalar_t>::real* sum) {
  if (chunk.all_inside) {
    gather_vectors<vectors, true>(chunk, value, sum);
  } else {
    gather_vectors<vectors, false>(chunk, value, sum);
  }
}

// sum[c] += the chunk's samples, for all channels of a head.
template <typename scalar_t>
inline void add_samples(const Chunk<scalar_t>& chunk, const scalar_t* value, int64_t channels,
                        typename Lanes<scalar_t>::real* sum) {
  using L = Lanes<scalar_t>;
  int64_t c = 0;
  for (; c + 4 * L::count <= channels; c += 4 * L::count) gather<4>(chunk, value + c, sum + c);
  for (; c + 2 * L::count <= channels; c += 2 * L::count) gather<2>(chunk, value + c, sum + c);
  if constexpr (!L::is_narrow) {
    for (; c + L::count <= channels; c += L::count) gather<1>(chunk, value + c, sum + c);
  }
  for (; c < channels; ++c) {
    for (int i = 0; i < chunk.count; ++i) {
      for (int corner = 0; corner < 4; ++corner) {
        const auto offset = chunk.offset[corner][i];
        if (offset >= 0) {
          sum[c] += chunk.share[corner][i] * static_cast<typename L::real>(value[offset + c]);
        }
      }
    }
  }
}

// Writes the sums of a row, rounded where the type is narrower.
template <typename scalar_t>
inline void store_sums(const typename Lanes<scalar_t>::real* sum, int64_t channels,
                       scalar_t* output) {
  using L = Lanes<scalar_t>;
  int64_t c = 0;
  for (; c + 2 * L::count <= channels; c += 2 * L::count) {
    typename L::Real pair[2];
    load_channels(sum + c, pair);
    store_channels(output + c, pair);
  }
  for (; c < channels; ++c) output[c] = static_cast<scalar_t>(sum[c]);
}

// The queries [begin, end) of a head, counted over all images.
template <typename scalar_t, typename location_t>
inline void forward_head(const Call& call, const Plan<scalar_t>& plan, int64_t begin, int64_t end,
                         int64_t head, const scalar_t* value, Sampling<scalar_t>& sampling,
                         typename Lanes<scalar_t>::real* sums) {
  const int64_t rows = call.batch * call.queries * call.heads;
  Chunk<scalar_t> chunk;
  for (int64_t query = begin; query < end; ++query) {
    const int64_t row = query * call.heads + head;
    const auto* locations = static_cast<const location_t*>(call.locations) + row * plan.samples * 2;
    const auto* weights = static_cast<const location_t*>(call.weights) + row * plan.samples;
    if (call.reference != nullptr) sampling.set(call, query, locations, weights);
    auto* output = static_cast<scalar_t*>(call.output) + row * call.channels;
    auto* sum = sums;
    if constexpr (!Lanes<scalar_t>::is_narrow) sum = output;
    for (int64_t c = 0; c < call.channels; ++c) sum[c] = 0;
    for (int64_t first = 0; first < plan.samples; first += chunk.kSamples) {
      if (call.reference != nullptr) {
        chunk.fill(plan, first, plan.samples, sampling.locations(), sampling.weights(),
                   sampling.padded());
      } else {
        chunk.fill(plan, first, plan.samples, locations, weights, (rows - row) * plan.samples);
      }
      add_samples(chunk, value, call.channels, sum);
    }
    if constexpr (Lanes<scalar_t>::is_narrow) store_sums(sum, call.channels, output);
  }
}

template <typename scalar_t, typename location_t>
void forward(const Call& call, int64_t begin, int64_t end) {
  const int64_t stride = call.heads * call.channels;
  const Plan<scalar_t> plan(call, 0, call.levels, 1, stride);
  const Plan<scalar_t> copy_plan(call, 0, call.levels, 1, call.channels);
  Sampling<scalar_t> sampling(call);
  const Buffer<typename Lanes<scalar_t>::real> sums(call.channels);
  // Pixels of a head are as far from each other as all heads take, a power of two as a rule, so
  // that few of them fit into the first-level cache together. Where pixels are read several times
  // it is worth it to have those of the head side by side.
  const auto is_worth_it = [&](int64_t queries) { return queries * plan.samples > call.tokens; };
  const int64_t most_queries = end - begin < call.queries ? end - begin : call.queries;
  const Buffer<scalar_t> copy(is_worth_it(most_queries) ? call.tokens * call.channels : 0);
  for (int64_t next; begin < end; begin = next) {
    const int64_t part = begin / call.queries;
    next = (part + 1) * call.queries < end ? (part + 1) * call.queries : end;
    const int64_t image = part / call.heads;
    const int64_t head = part % call.heads;
    const auto* value = static_cast<const scalar_t*>(call.value) + image * call.tokens * stride +
                        head * call.channels;
    const int64_t first = image * call.queries + begin % call.queries;
    const int64_t last = first + next - begin;
    if (is_worth_it(next - begin)) {
      copy_rows(call.tokens, call.channels, value, stride, copy.numbers, call.channels);
      forward_head<scalar_t, location_t>(call, copy_plan, first, last, head, copy.numbers, sampling,
                                         sums.numbers);
    } else {
      forward_head<scalar_t, location_t>(call, plan, first, last, head, value, sampling,
                                         sums.numbers);
    }
  }
}
