// Vectors of numbers. A part of kernels_impl.h, which says what may stand here.

template <typename T, int count>
struct Vector {
  typedef T type __attribute__((vector_size(sizeof(T) * count)));
};

// Numbers side by side, as 16 bit types, float and double are computed with.
template <typename scalar_t>
struct Lanes {
  static constexpr bool is_double = sizeof(scalar_t) == 8;
  using real = std::conditional_t<is_double, double, float>;
  using integer = std::conditional_t<is_double, int64_t, int32_t>;
  static constexpr bool is_narrow = sizeof(scalar_t) < sizeof(real);
  static constexpr int count = kVectorBytes / sizeof(real);
  using Real = typename Vector<real, count>::type;
  using Integer = typename Vector<integer, count>::type;
  using Bits = typename Vector<uint32_t, count>::type;
};

template <typename vector>
inline vector load_bytes(const void* from) {
  vector to;
  __builtin_memcpy(&to, from, sizeof to);
  return to;
}

template <typename vector>
inline void store(void* to, vector from) {
  __builtin_memcpy(to, &from, sizeof from);
}

// The floats that are equal to numbers of 16 bits, which stand in the lower half of each word.
template <typename scalar_t>
inline typename Lanes<scalar_t>::Real widen(typename Lanes<scalar_t>::Bits bits) {
  using L = Lanes<scalar_t>;
  if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
    return (typename L::Real)(bits << 16);
  } else {
    // Exponents of half start at -15, those of float at -127; infinity and NaN stay themselves.
    const typename L::Bits magnitude = (bits & 0x7fff) << 13;
    const typename L::Bits scaled = (typename L::Bits)((typename L::Real)magnitude * 0x1p112f);
    const typename L::Bits special = magnitude | 0x7f800000;
    const typename L::Bits sign = (bits & 0x8000) << 16;
    return (typename L::Real)((magnitude >= 0x0f800000 ? special : scaled) | sign);
  }
}

// The other way round: to the nearest, of two to the even one.
template <typename scalar_t>
inline typename Lanes<scalar_t>::Bits narrow(typename Lanes<scalar_t>::Real numbers) {
  using L = Lanes<scalar_t>;
  using Bits = typename L::Bits;
  const Bits bits = (Bits)numbers;
  const Bits magnitude = bits & 0x7fffffff;
  if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
    const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return magnitude > 0x7f800000 ? Bits{} + 0x7fc0 : rounded;
  } else {
    const Bits rounded = (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // Below 2^-14 numbers of half are 2^-24 apart, as floats are between 0.5 and 1.
    const Bits small = (Bits)((typename L::Real)magnitude + 0.5f) - 0x3f000000;
    const Bits finite = magnitude < 0x38800000 ? small : rounded;
    const Bits limited = magnitude >= 0x477ff000 ? Bits{} + 0x7c00 : finite;
    return (magnitude > 0x7f800000 ? Bits{} + 0x7e00 : limited) | (bits >> 16 & 0x8000);
  }
}

// Numbers side by side, in their order.
template <typename scalar_t>
inline typename Lanes<scalar_t>::Real load(const scalar_t* from) {
  using L = Lanes<scalar_t>;
  if constexpr (L::is_narrow) {
    const auto words = load_bytes<typename Vector<uint16_t, L::count>::type>(from);
    return widen<scalar_t>(__builtin_convertvector(words, typename L::Bits));
  } else {
    return load_bytes<typename L::Real>(from);
  }
}

// `vectors` vectors of channels. Those of 16 bits come in pairs: one with the channels at even
// places, one with those at odd places, which is the order in which they are computed with.
template <int vectors, typename scalar_t>
inline void load_channels(const scalar_t* from, typename Lanes<scalar_t>::Real (&to)[vectors]) {
  using L = Lanes<scalar_t>;
  if constexpr (L::is_narrow) {
    static_assert(vectors % 2 == 0);
    for (int v = 0; v < vectors; v += 2) {
      const auto words = load_bytes<typename L::Bits>(from + v * L::count);
      if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
        to[v] = (typename L::Real)(words << 16);
        to[v + 1] = (typename L::Real)(words & 0xffff0000);
      } else {
        to[v] = widen<scalar_t>(words & 0xffff);
        to[v + 1] = widen<scalar_t>(words >> 16);
      }
    }
  } else {
    for (int v = 0; v < vectors; ++v) to[v] = load_bytes<typename L::Real>(from + v * L::count);
  }
}

template <int vectors, typename scalar_t>
inline void store_channels(scalar_t* to, const typename Lanes<scalar_t>::Real (&from)[vectors]) {
  using L = Lanes<scalar_t>;
  if constexpr (L::is_narrow) {
    for (int v = 0; v < vectors; v += 2) {
      store(to + v * L::count, narrow<scalar_t>(from[v]) | narrow<scalar_t>(from[v + 1]) << 16);
    }
  } else {
    for (int v = 0; v < vectors; ++v) store(to + v * L::count, from[v]);
  }
}

// The lanes at even (0) or odd (1) places of a, then those of b.
template <int odd, typename scalar_t, typename vector>
inline vector every_other(vector a, vector b) {
  using L = Lanes<scalar_t>;
#if defined(__clang__)
  if constexpr (L::count == 2)
    return __builtin_shufflevector(a, b, odd, 2 + odd);
  else if constexpr (L::count == 4)
    return __builtin_shufflevector(a, b, odd, 2 + odd, 4 + odd, 6 + odd);
  else if constexpr (L::count == 8)
    return __builtin_shufflevector(a, b, odd, 2 + odd, 4 + odd, 6 + odd, 8 + odd, 10 + odd,
                                   12 + odd, 14 + odd);
  else
    return __builtin_shufflevector(a, b, odd, 2 + odd, 4 + odd, 6 + odd, 8 + odd, 10 + odd,
                                   12 + odd, 14 + odd, 16 + odd, 18 + odd, 20 + odd, 22 + odd,
                                   24 + odd, 26 + odd, 28 + odd, 30 + odd);
#else
  typename L::Integer places;
  for (int i = 0; i < L::count; ++i) places[i] = 2 * i + odd;
  return __builtin_shuffle(a, b, places);
#endif
}

// Lane i of the result is the sum of the lanes of vectors[i].
template <typename scalar_t, typename vector>
inline vector sum_lanes(vector (&vectors)[Lanes<scalar_t>::count]) {
  for (int left = Lanes<scalar_t>::count / 2; left > 0; left /= 2) {
    for (int i = 0; i < left; ++i) {
      vectors[i] = every_other<0, scalar_t>(vectors[2 * i], vectors[2 * i + 1]) +
                   every_other<1, scalar_t>(vectors[2 * i], vectors[2 * i + 1]);
    }
  }
  return vectors[0];
}

// e^x for x <= 0: 2^n e^r with |r| <= log(2) / 2, the latter by its Taylor polynomial, to about two
// units in the last place of a float. Below -87 it is as good as zero.
template <typename L>
inline typename L::Real exponential(typename L::Real x) {
  if constexpr (sizeof(typename L::real) == 8) {
    for (int lane = 0; lane < L::count; ++lane) x[lane] = __builtin_exp(x[lane]);
    return x;
  } else {
    const typename L::Real lowest = typename L::Real{} - 87.0f;
    x = x < lowest ? lowest : x;  // NaN stays
    const auto n = __builtin_convertvector(x * 1.44269504f - 0.5f, typename L::Integer);
    const auto whole = __builtin_convertvector(n, typename L::Real);
    const typename L::Real r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    typename L::Real sum = r * (1.0f / 720) + (1.0f / 120);
    sum = sum * r + (1.0f / 24);
    sum = sum * r + (1.0f / 6);
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    return sum * (typename L::Real)((n + 127) << 23);
  }
}

constexpr int64_t kCacheLine = 64;  // bytes

// Asks for `count` numbers that will soon be read (0) or written (1).
template <int written, typename T>
inline void prefetch(const T* numbers, int64_t count) {
  constexpr int64_t kStep = kCacheLine / sizeof(T);
  for (int64_t i = 0; i < count; i += kStep) __builtin_prefetch(numbers + i, written);
}

// Copies rows of `count` numbers, which are `from_step` and `to_step` numbers apart.
template <typename to_t, typename from_t>
inline void copy_rows(int64_t rows, int64_t count, const from_t* from, int64_t from_step, to_t* to,
                      int64_t to_step) {
  for (int64_t row = 0; row < rows; ++row, from += from_step, to += to_step) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
      for (int j = 0; j < 4; ++j) to[i + j] = static_cast<to_t>(from[i + j]);
    }
    for (; i < count; ++i) to[i] = static_cast<to_t>(from[i]);
  }
}

// Numbers, zero at first, that begin with a cache line: vectors across two lines take longer. By
// the usual allocator, since memory from the one for aligned memory is not used again as well.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : memory_(new char[count * sizeof(T) + kCacheLine]()) {
    const auto misalignment = reinterpret_cast<uintptr_t>(memory_) % kCacheLine;
    numbers = reinterpret_cast<T*>(memory_ + (kCacheLine - misalignment) % kCacheLine);
  }
  ~Buffer() { delete[] memory_; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* numbers;

 private:
  char* const memory_;
};
