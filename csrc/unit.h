// Vectors of one unit: part of units.h, which has set GRASSLAND_REGISTER, the floats of a register.

using Vec = typename Split<float, kLanes, GRASSLAND_REGISTER>::type;
using VecBits = typename Each<Vec>::Bits;

// Of AVX-512's thirty-two registers a tile of a product may have twenty-four sums.
constexpr bool kWide = GRASSLAND_REGISTER == kLanes;

template <typename T>
GRASSLAND_INLINE Vec load_full(const T* p) {
  return Each<Vec>::load(p);
}

template <typename T>
GRASSLAND_INLINE void store_full(const Vec& v, T* p) {
  Each<Vec>::store(v, p);
}

// Lanes past the end of a row are loaded as zero and not stored.
template <typename T>
GRASSLAND_INLINE Vec load(const T* p, int64_t live) {
  if (__builtin_constant_p(live) && live == kLanes) return load_full(p);
  T row[kLanes] = {};
  copy_few(row, p, live);
  return load_full(row);
}

template <typename T>
GRASSLAND_INLINE void store(const Vec& v, T* p, int64_t live) {
  if (__builtin_constant_p(live) && live == kLanes) return store_full(v, p);
  T row[kLanes];
  store_full(v, row);
  copy_few(p, row, live);
}

GRASSLAND_INLINE VecBits load_bits(const uint32_t* p) { return Each<Vec>::load(p); }

GRASSLAND_INLINE VecBits lanes() { return Each<Vec>::count(0); }

// x in the lanes where `mask` holds, 0 elsewhere.
template <typename M>
GRASSLAND_INLINE Vec keep(const Vec& x, const M& mask) {
  return Each<Vec>::keep(x, mask);
}

template <typename M>
GRASSLAND_INLINE Vec choose(const M& mask, const Vec& a, const Vec& b) {
  return Each<Vec>::choose(mask, a, b);
}

// The second where either is a NaN.
GRASSLAND_INLINE Vec larger(const Vec& a, const Vec& b) { return choose(a > b, a, b); }

// The first `live` lanes of x, then those of `rest`.
GRASSLAND_INLINE Vec leading(const Vec& x, int64_t live, const Vec& rest) {
  if (__builtin_constant_p(live) && live == kLanes) return x;
  return choose(lanes() < static_cast<uint32_t>(live), x, rest);
}

GRASSLAND_INLINE float total(const Vec& v) {
  return reduced(v, [](const auto& a, const auto& b) GRASSLAND_INLINE_LAMBDA { return a + b; });
}

// Lane i is the total of the i-th of sixteen vectors that lie one behind the other.
GRASSLAND_INLINE Vec totals_of(const float* rows) {
  Vec m[kLanes];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) m[i] = load_full(rows + i * kLanes);
  return totals(m);
}

// The largest of n numbers that are no NaN.
template <typename T>
GRASSLAND_INLINE float largest(const T* x, int64_t n) {
  Vec peak = Vec{} - std::numeric_limits<float>::infinity();
  for_each_vector(n, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    peak = larger(leading(load(x + c, live), live, peak), peak);
  });
  return reduced(peak, [](const auto& a, const auto& b) GRASSLAND_INLINE_LAMBDA {
    return Each<std::decay_t<decltype(a)>>::choose(a > b, a, b);
  });
}

// As exp_approx of common.h for |v| <= 87: adding 1.5 x 2^23 rounds to an integer, which the last bits hold.
GRASSLAND_INLINE Vec exp_within(const Vec& v) {
  const Vec shifted = v * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const Vec r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * kExp[4] + kExp[3];
  p = p * r + kExp[2];
  p = p * r + kExp[1];
  p = p * r + kExp[0];
  p = (p * r) * r + r + 1.0f;
  return p * Each<Vec>::power(shifted);
}

// e^x for x <= 0
GRASSLAND_INLINE Vec exp_below(const Vec& x) {
  const Vec least = Vec{} - 87.0f;
  return exp_within(larger(least, x));
}

GRASSLAND_INLINE Vec exp_clamped(const Vec& x) {
  const Vec most = Vec{} + 87.0f;
  return exp_below(choose(most < x, most, x));
}

GRASSLAND_INLINE Vec square_root(const Vec& v) {
  float part[kLanes];
  store_full(v, part);
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) part[i] = std::sqrt(part[i]);
  return load_full(part);
}
