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
  static constexpr int count = kVectorBytes / sizeof(real);
  using Real = typename Vector<real, count>::type;
  using Integer = typename Vector<integer, count>::type;
};

template <typename vector>
inline vector load_bytes(const void* from) {
  vector to;
  __builtin_memcpy(&to, from, sizeof to);
  return to;
}

template <typename scalar_t>
inline typename Lanes<scalar_t>::Real load(const scalar_t* from) {
  using L = Lanes<scalar_t>;
  if constexpr (sizeof(scalar_t) == sizeof(typename L::real)) {
    return load_bytes<typename L::Real>(from);
  } else {
    using Bits = typename Vector<uint32_t, L::count>::type;
    const auto narrow = load_bytes<typename Vector<uint16_t, L::count>::type>(from);
    const Bits bits = __builtin_convertvector(narrow, Bits);
    if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
      return (typename L::Real)(bits << 16);
    } else {
      // Exponents of half start at -15, those of float at -127; infinity and NaN stay themselves.
      const Bits magnitude = (bits & 0x7fff) << 13;
      const Bits scaled = (Bits)((typename L::Real)magnitude * 0x1p112f);
      const Bits special = magnitude | 0x7f800000;
      const Bits sign = (bits & 0x8000) << 16;
      return (typename L::Real)((magnitude >= 0x0f800000 ? special : scaled) | sign);
    }
  }
}

template <typename vector>
inline void store(void* to, vector from) {
  __builtin_memcpy(to, &from, sizeof from);
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
