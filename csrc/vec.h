// Sixteen floats as one value, which each clone of a function splits into the registers it has. Lanes past the end of a row
// are loaded as zero and not stored.
#pragma once

#include "common.h"

#include <limits>
#include <utility>

// Nothing here is called across a function boundary, so that the ABI of vector arguments does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace grassland {

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t VecInts __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t VecHalves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

GRASSLAND_INLINE Vec load_full(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

GRASSLAND_INLINE void store_full(const Vec& v, float* p) { __builtin_memcpy(p, &v, sizeof(v)); }

// memcpy of up to 64 bytes, an even number of them, without a call.
GRASSLAND_INLINE void copy_few(void* to, const void* from, int64_t bytes) {
  if (__builtin_constant_p(bytes)) {
    std::memcpy(to, from, bytes);
    return;
  }
  int64_t at = 0;
#pragma GCC unroll 6
  for (int64_t part = 64; part >= 2; part /= 2)
    if (bytes & part) {
      std::memcpy(static_cast<char*>(to) + at, static_cast<const char*>(from) + at, part);
      at += part;
    }
}

GRASSLAND_INLINE Vec load(const float* p, int64_t live) {
  Vec v = {};
  copy_few(&v, p, live * sizeof(float));
  return v;
}

GRASSLAND_INLINE void store(const Vec& v, float* p, int64_t live) { copy_few(p, &v, live * sizeof(float)); }

GRASSLAND_INLINE Vec widen(const VecHalves& halves) {
  const VecBits bits = __builtin_convertvector(halves, VecBits) << 16;
  Vec v;
  __builtin_memcpy(&v, &bits, sizeof(v));
  return v;
}

// Round to nearest even; a NaN stays a NaN.
GRASSLAND_INLINE VecHalves narrow_halves(const Vec& v) {
  VecBits bits;
  __builtin_memcpy(&bits, &v, sizeof(bits));
  const VecBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecBits nan = (VecBits)(v != v);
  return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), VecHalves);
}

GRASSLAND_INLINE Vec load(const bf16* p, int64_t live) {
  VecHalves halves = {};
  copy_few(&halves, p, live * sizeof(bf16));
  return widen(halves);
}

GRASSLAND_INLINE void store(const Vec& v, bf16* p, int64_t live) {
  const VecHalves halves = narrow_halves(v);
  copy_few(p, &halves, live * sizeof(bf16));
}

// Lanes of low and high side by side, by their index in 0 .. 31.
template <size_t... index>
GRASSLAND_INLINE Vec shuffled(const Vec& low, const Vec& high) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(low, high, index...);
#else
  return __builtin_shuffle(low, high, VecBits{index...});
#endif
}

// f(c, live) for each vector of a row; `live` is a constant in all but the last, so that only that one has a tail.
template <typename F>
GRASSLAND_INLINE void for_each_vector(int64_t size, F&& f) {
  int64_t c = 0;
  for (; c + kLanes <= size; c += kLanes) f(c, std::integral_constant<int64_t, kLanes>{});
  if (c < size) f(c, size - c);
}

template <size_t step, size_t... lane>
GRASSLAND_INLINE Vec across(const Vec& v, std::index_sequence<lane...>) {
  return shuffled<(lane ^ step)...>(v, v);
}

// All lanes by a commutative function of two vectors.
template <typename F>
GRASSLAND_INLINE float reduced(Vec v, const F& f) {
  constexpr auto lanes = std::make_index_sequence<kLanes>{};
  v = f(v, across<8>(v, lanes));
  v = f(v, across<4>(v, lanes));
  v = f(v, across<2>(v, lanes));
  return f(v, across<1>(v, lanes))[0];
}

GRASSLAND_INLINE float total(const Vec& v) {
  return reduced(v, [](const Vec& a, const Vec& b) GRASSLAND_INLINE_LAMBDA { return a + b; });
}

// x where `mask` has all bits of a lane, 0 where it has none.
GRASSLAND_INLINE Vec keep(const Vec& x, const VecBits& mask) {
  VecBits bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  bits &= mask;
  Vec kept;
  __builtin_memcpy(&kept, &bits, sizeof(kept));
  return kept;
}

// The largest of n numbers that are no NaN.
template <typename T>
GRASSLAND_INLINE float largest(const T* x, int64_t n) {
  Vec peak = Vec{} - std::numeric_limits<float>::infinity();
  for_each_vector(n, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    Vec v = load(x + c, live);
    for (int64_t i = live; i < kLanes; ++i) v[i] = peak[i];
    peak = v > peak ? v : peak;
  });
  return reduced(peak, [](const Vec& a, const Vec& b) GRASSLAND_INLINE_LAMBDA { return a > b ? a : b; });
}

// As exp_approx of common.h for |v| <= 87: adding and taking away 1.5 x 2^23 rounds to an integer.
GRASSLAND_INLINE Vec exp_within(const Vec& v) {
  const Vec n = (v * 1.44269504f + 12582912.0f) - 12582912.0f;
  const Vec r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.0f;
  const VecBits bits = __builtin_convertvector(__builtin_convertvector(n, VecInts) + 127, VecBits) << 23;
  Vec scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

// e^x for x <= 0
GRASSLAND_INLINE Vec exp_below(const Vec& x) {
  const Vec least = Vec{} - 87.0f;
  return exp_within(x < least ? least : x);
}

GRASSLAND_INLINE Vec exp_clamped(const Vec& x) {
  const Vec most = Vec{} + 87.0f;
  return exp_below(x > most ? most : x);
}

GRASSLAND_INLINE Vec square_root(const Vec& v) {
  float part[kLanes];
  store_full(v, part);
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) part[i] = std::sqrt(part[i]);
  return load_full(part);
}

template <size_t step, size_t... lane>
GRASSLAND_INLINE void fold(Vec (&m)[kLanes], std::index_sequence<lane...>) {
  for (size_t i = 0; i < step; ++i) {
    const Vec low = m[i], high = m[i + step];
    m[i] = shuffled<(lane & step ? lane + kLanes : lane)...>(low, high) +
           shuffled<(lane & step ? lane + kLanes - step : lane + step)...>(low, high);
  }
}

// Lane i is the total of the i-th of sixteen vectors, which are used up.
GRASSLAND_INLINE Vec totals(Vec (&m)[kLanes]) {
  constexpr auto lanes = std::make_index_sequence<kLanes>{};
  fold<8>(m, lanes);
  fold<4>(m, lanes);
  fold<2>(m, lanes);
  fold<1>(m, lanes);
  return m[0];
}

// The same of vectors that lie one behind the other.
GRASSLAND_INLINE Vec totals(const float* rows) {
  Vec m[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) m[i] = load_full(rows + i * kLanes);
  return totals(m);
}

// Exchanges the lanes whose index has the bit `step` with the vectors whose index has it.
template <int step, size_t... lane>
GRASSLAND_INLINE void exchange(Vec (&m)[kLanes], std::index_sequence<lane...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & step) continue;
    const Vec low = m[i], high = m[i + step];
    m[i] = shuffled<(lane & step ? lane - step + kLanes : lane)...>(low, high);
    m[i + step] = shuffled<(lane & step ? lane + kLanes : lane + step)...>(low, high);
  }
}

GRASSLAND_INLINE void transpose(Vec (&m)[kLanes]) {
  constexpr auto lanes = std::make_index_sequence<kLanes>{};
  exchange<1>(m, lanes);
  exchange<2>(m, lanes);
  exchange<4>(m, lanes);
  exchange<8>(m, lanes);
}

}  // namespace grassland
