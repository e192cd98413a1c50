// Where the samples of a query lie. A part of kernels_impl.h, which says what may stand here.

// What is the same for all chunks: the level of each sample. A chunk has the samples of a head of
// `queries` queries, from first_level to last_level, or some of those of one query.
template <typename scalar_t>
struct Plan {
  using L = Lanes<scalar_t>;
  struct Group {
    typename L::Real width, height;
    Layout<typename L::Integer> layout;
  };

  int64_t samples;     // of one query
  int64_t queries;     // in a chunk
  int64_t tokens = 0;  // of these levels
  int64_t skipped_tokens = 0;
  Group* groups;

  // Pixels are `stride` numbers apart.
  Plan(const Call& call, int64_t first_level, int64_t last_level, int64_t queries_, int64_t stride)
      : samples((last_level - first_level) * call.points),
        queries(queries_),
        groups(new Group[(queries * samples + L::count - 1) / L::count]) {
    for (int64_t l = 0; l < first_level; ++l) {
      skipped_tokens += call.spatial_shapes[2 * l] * call.spatial_shapes[2 * l + 1];
    }
    int64_t sample = 0;
    for (int64_t query = 0; query < queries; ++query) {
      tokens = 0;
      for (int64_t l = first_level; l < last_level; ++l) {
        const int64_t rows = call.spatial_shapes[2 * l];
        const int64_t columns = call.spatial_shapes[2 * l + 1];
        for (int64_t k = 0; k < call.points; ++k, ++sample) {
          put(sample, rows, columns, tokens, stride);
        }
        tokens += rows * columns;
      }
    }
    // In a level without pixels every location is outside.
    for (; sample % L::count != 0; ++sample) put(sample, 0, 0, 0, 0);
  }
  ~Plan() { delete[] groups; }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

 private:
  void put(int64_t sample, int64_t rows, int64_t columns, int64_t first_token, int64_t stride) {
    Group& group = groups[sample / L::count];
    const int lane = sample % L::count;
    group.width[lane] = columns;
    group.height[lane] = rows;
    group.layout.columns[lane] = columns;
    group.layout.rows[lane] = rows;
    group.layout.first[lane] = first_token * stride;
    group.layout.row_step[lane] = columns * stride;
    group.layout.column_step[lane] = stride;
  }
};

// Some samples of one head: as many as are computed before pixels are read.
template <typename scalar_t>
struct Chunk {
  using L = Lanes<scalar_t>;
  static constexpr int kGroups = 32 / L::count;
  static constexpr int kSamples = kGroups * L::count;

  int count;
  bool all_inside;
  typename L::integer offset[4][kSamples];  // from the head's first pixel; negative is outside
  typename L::real share[4][kSamples];      // of the corner in the output
  Corners<typename L::Real, typename L::Integer> corners[kGroups];
  typename L::Real attention[kGroups];

  // The samples [first, end) of those whose locations and weights begin at these addresses, or as
  // many as there is room for. Memory has at least `readable` samples there.
  template <typename location_t>
  __attribute__((always_inline)) inline void fill(const Plan<scalar_t>& plan, int64_t first,
                                                  int64_t end, const location_t* locations,
                                                  const location_t* weights, int64_t readable) {
    const int64_t left = end - first;
    count = left < kSamples ? left : kSamples;
    typename L::Integer outside{};
    for (int i = 0; i < count; i += L::count) {
      typename L::Real x, y, weight;
      if (first + i + L::count <= readable) {
        deinterleave(locations + 2 * (first + i), x, y);
        weight = load_location(weights + first + i);
      } else {
        location_t padded[2 * L::count] = {}, padded_weights[L::count] = {};
        for (int j = 0; j < count - i; ++j) {
          padded[2 * j] = locations[2 * (first + i + j)];
          padded[2 * j + 1] = locations[2 * (first + i + j) + 1];
          padded_weights[j] = weights[first + i + j];
        }
        deinterleave(padded, x, y);
        weight = load_location(padded_weights);
      }
      const auto& group = plan.groups[(first + i) / L::count];
      auto& found = corners[i / L::count];
      found = find_corners(x, y, group.width, group.height, group.layout);
      attention[i / L::count] = weight;
      for (int corner = 0; corner < 4; ++corner) {
        outside |= found.place[corner];
        store(offset[corner] + i, found.place[corner]);
        store(share[corner] + i, weight * found.share(corner));
      }
    }
    typename L::integer any = 0;
    for (int i = 0; i < L::count; ++i) any |= outside[i];
    all_inside = any >= 0;
  }

 private:
  template <typename location_t>
  static inline typename L::Real load_location(const location_t* from) {
    return load(from);
  }
  template <typename location_t>
  static inline void deinterleave(const location_t* from, typename L::Real& x,
                                  typename L::Real& y) {
    const auto a = load(from);
    const auto b = load(from + L::count);
    x = every_other<0, scalar_t>(a, b);
    y = every_other<1, scalar_t>(a, b);
  }
};

// Locations and weights of the samples of one head of one query, from offsets and from numbers
// before the softmax.
template <typename scalar_t>
class Sampling {
  using L = Lanes<scalar_t>;
  using real = typename L::real;

 public:
  explicit Sampling(const Call& call)
      : samples_(call.levels * call.points),
        padded_((samples_ + L::count - 1) / L::count * L::count),
        buffer_(padded_ * 7),
        numbers_(buffer_.numbers) {
    for (int64_t l = 0; l < call.levels; ++l) {
      set_scale(call, l, 1 / real(call.spatial_shapes[2 * l + 1]),
                1 / real(call.spatial_shapes[2 * l]));
    }
  }

  const real* locations() const { return numbers_; }
  const real* weights() const { return numbers_ + 2 * padded_; }
  int64_t padded() const { return padded_; }

  template <typename location_t>
  inline void set(const Call& call, int64_t query, const location_t* offsets,
                  const location_t* numbers) {
    real* const shift = numbers_ + 3 * padded_;
    const real* const scale = numbers_ + 5 * padded_;
    const auto* reference =
        static_cast<const real*>(call.reference) + query * call.levels * call.reference_size;
    for (int64_t l = 0; l < call.levels; ++l, reference += call.reference_size) {
      for (int64_t k = l * call.points; k < (l + 1) * call.points; ++k) {
        store(shift + 2 * k, load_bytes<typename Vector<real, 2>::type>(reference));
      }
      if (call.reference_size == 4) {
        const real unit = real(0.5) / call.points;
        set_scale(call, l, reference[2] * unit, reference[3] * unit);
      }
    }
    real* weights = numbers_ + 2 * padded_;
    int64_t i = 0;
    for (; i + L::count <= 2 * samples_; i += L::count) {
      const auto location = load_bytes<typename L::Real>(shift + i) +
                            load(offsets + i) * load_bytes<typename L::Real>(scale + i);
      store(numbers_ + i, location);
    }
    for (; i < 2 * samples_; ++i) {
      numbers_[i] = shift[i] + static_cast<real>(offsets[i]) * scale[i];
    }

    for (i = 0; i + L::count <= samples_; i += L::count) store(weights + i, load(numbers + i));
    for (; i < samples_; ++i) weights[i] = static_cast<real>(numbers[i]);
    for (; i < padded_; ++i) weights[i] = real(-1e30);
    auto largest = load_bytes<typename L::Real>(weights);
    for (i = L::count; i < padded_; i += L::count) {
      const auto next = load_bytes<typename L::Real>(weights + i);
      largest = next > largest ? next : largest;
    }
    real top = largest[0];
    for (int lane = 1; lane < L::count; ++lane) top = largest[lane] > top ? largest[lane] : top;
    typename L::Real sums{};
    for (i = 0; i < padded_; i += L::count) {
      const auto power = exponential<L>(load_bytes<typename L::Real>(weights + i) - top);
      store(weights + i, power);
      sums += power;
    }
    real sum = 0;
    for (int lane = 0; lane < L::count; ++lane) sum += sums[lane];
    const real factor = 1 / sum;
    for (i = 0; i < padded_; i += L::count) {
      store(weights + i, load_bytes<typename L::Real>(weights + i) * factor);
    }
  }

 private:
  const int64_t samples_;
  const int64_t padded_;
  const Buffer<real> buffer_;
  real* const numbers_;  // locations, weights, and shift and scale of the offsets

  inline void set_scale(const Call& call, int64_t level, real x, real y) {
    real* const scale = numbers_ + 5 * padded_;
    for (int64_t k = level * call.points; k < (level + 1) * call.points; ++k) {
      scale[2 * k] = x;
      scale[2 * k + 1] = y;
    }
  }
};
