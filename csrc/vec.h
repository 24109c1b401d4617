// Sixteen floats as one value: one register of AVX-512, a pair of AVX2's, a pair of pairs of SSE's or NEON's. Left to split a
// vector of sixteen itself, GCC keeps it in memory and fills and shuffles it number by number: KromHC took seven times as
// long on AVX2. units.h gives kernels the names that they use.
#pragma once

#include "common.h"

#include <cstdlib>
#include <limits>
#include <string_view>
#include <utility>

// Nothing here is called across a function boundary, so that the ABI of vector arguments does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace grassland {

// n numbers in one register
template <typename T, int n>
struct Register {
  typedef T type __attribute__((vector_size(n * sizeof(T))));
};

template <typename Half>
struct Pair {
  Half low, high;
};

// `lanes` numbers in registers of n.
template <typename T, int lanes, int n>
struct Split {
  using type = Pair<typename Split<T, lanes / 2, n>::type>;
};
template <typename T, int n>
struct Split<T, n, n> {
  using type = typename Register<T, n>::type;
};

// Numbers from and to memory
template <typename V, typename T>
GRASSLAND_INLINE void take(const T* p, V& v) {
  __builtin_memcpy(&v, p, sizeof(v));
}

template <typename H, typename T>
GRASSLAND_INLINE void take(const T* p, Pair<H>& v) {
  take(p, v.low);
  take(p + sizeof(H) / sizeof(T), v.high);
}

template <typename V, typename T>
GRASSLAND_INLINE void give(const V& v, T* p) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <typename H, typename T>
GRASSLAND_INLINE void give(const Pair<H>& v, T* p) {
  give(v.low, p);
  give(v.high, p + sizeof(H) / sizeof(T));
}

// Reads v into registers once. Where there are sixteen of them, GCC reads what several instructions need from memory for
// each, and a product is as slow as its loads.
template <typename V>
GRASSLAND_INLINE void hold(V& v) {
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 32) asm("" : "+x"(v));
#endif
}

template <typename H>
GRASSLAND_INLINE void hold(Pair<H>& v) {
  hold(v.low);
  hold(v.high);
}

template <typename V>
constexpr int kLanesOf = sizeof(V) / sizeof(float);

#define GRASSLAND_PAIRWISE(op)                                                                             \
  template <typename H, typename G>                                                                        \
  GRASSLAND_INLINE auto operator op(const Pair<H>& a, const Pair<G>& b) {                                  \
    return Pair<decltype(a.low op b.low)>{a.low op b.low, a.high op b.high};                               \
  }                                                                                                        \
  template <typename H, typename S, typename = std::enable_if_t<std::is_arithmetic_v<S>>>                  \
  GRASSLAND_INLINE auto operator op(const Pair<H>& a, S b) {                                               \
    return Pair<decltype(a.low op b)>{a.low op b, a.high op b};                                            \
  }                                                                                                        \
  template <typename H, typename S, typename = std::enable_if_t<std::is_arithmetic_v<S>>>                  \
  GRASSLAND_INLINE auto operator op(S a, const Pair<H>& b) {                                               \
    return Pair<decltype(a op b.low)>{a op b.low, a op b.high};                                            \
  }
GRASSLAND_PAIRWISE(+)
GRASSLAND_PAIRWISE(-)
GRASSLAND_PAIRWISE(*)
GRASSLAND_PAIRWISE(/)
GRASSLAND_PAIRWISE(&)
GRASSLAND_PAIRWISE(^)
GRASSLAND_PAIRWISE(>>)
GRASSLAND_PAIRWISE(<<)
GRASSLAND_PAIRWISE(<)
GRASSLAND_PAIRWISE(<=)
GRASSLAND_PAIRWISE(>)
GRASSLAND_PAIRWISE(>=)
GRASSLAND_PAIRWISE(!=)

#define GRASSLAND_INTO(op)                                                      \
  template <typename H, typename O>                                             \
  GRASSLAND_INLINE Pair<H>& operator op##=(Pair<H>& a, const O& b) {            \
    return a = a op b;                                                          \
  }
GRASSLAND_INTO(+)
GRASSLAND_INTO(-)
GRASSLAND_INTO(*)
GRASSLAND_INTO(^)

template <typename H>
GRASSLAND_INLINE Pair<H> operator-(const Pair<H>& a) {
  return {-a.low, -a.high};
}

// What is done to registers one by one.
template <typename V>
struct Each {
  static constexpr int n = kLanesOf<V>;
  using Ints = typename Register<int32_t, n>::type;
  using Bits = typename Register<uint32_t, n>::type;
  using Halves = typename Register<uint16_t, n>::type;

  // GCC 12 converts sixteen numbers in two parts that it puts together, but sees one step in these.
  GRASSLAND_INLINE Bits widened(const Halves& halves) {
    if constexpr (n < kLanes) return __builtin_convertvector(halves, Bits);
    Bits bits;
    for (int i = 0; i < n; ++i) bits[i] = halves[i];
    return bits;
  }
  // The upper halves of words
  template <size_t... i>
  GRASSLAND_INLINE Halves upper(const Bits& bits, std::index_sequence<i...>) {
#if defined(__clang__) || __GNUC__ >= 12
    if constexpr (n == kLanes) {
      const auto all = (typename Register<uint16_t, 2 * n>::type)bits;
      return __builtin_shufflevector(all, all, (2 * i + 1)...);
    }
#endif
    return __builtin_convertvector(bits >> 16, Halves);
  }

  GRASSLAND_INLINE V load(const float* p) {
    V v;
    take(p, v);
    return v;
  }
  GRASSLAND_INLINE V load(const bf16* p) {
    Halves halves;
    take(p, halves);
    return (V)(widened(halves) << 16);
  }
  GRASSLAND_INLINE Bits load(const uint32_t* p) {
    Bits v;
    take(p, v);
    return v;
  }
  GRASSLAND_INLINE void store(const V& v, float* p) { give(v, p); }
  // Round to nearest even; a NaN stays a NaN.
  GRASSLAND_INLINE void store(const V& v, bf16* p) {
    const Bits bits = (Bits)v, rounded = bits + ((bits >> 16) & 1u) + 0x7fffu;
    give(upper(v != v ? Bits{} + 0x7fc00000u : rounded, std::make_index_sequence<n>{}), p);
  }
  // The numbers from `first` on.
  GRASSLAND_INLINE Bits count(uint32_t first) {
    Bits lanes;
    for (int i = 0; i < n; ++i) lanes[i] = i;
    return lanes + first;
  }
  GRASSLAND_INLINE V keep(const V& x, const Ints& mask) { return (V)((Ints)x & mask); }
  GRASSLAND_INLINE V choose(const Ints& mask, const V& a, const V& b) { return mask ? a : b; }
  // 2^n of n + 1.5 x 2^23
  GRASSLAND_INLINE V power(const V& shifted) { return (V)(((Bits)shifted << 23) + 0x3f800000u); }
};

template <typename H>
struct Each<Pair<H>> {
  using V = Pair<H>;
  using Ints = Pair<typename Each<H>::Ints>;
  using Bits = Pair<typename Each<H>::Bits>;
  static constexpr int half = kLanesOf<H>;

  GRASSLAND_INLINE Bits load(const uint32_t* p) { return {Each<H>::load(p), Each<H>::load(p + half)}; }
  template <typename T>
  GRASSLAND_INLINE V load(const T* p) {
    return {Each<H>::load(p), Each<H>::load(p + half)};
  }
  template <typename T>
  GRASSLAND_INLINE void store(const V& v, T* p) {
    Each<H>::store(v.low, p);
    Each<H>::store(v.high, p + half);
  }
  GRASSLAND_INLINE Bits count(uint32_t first) { return {Each<H>::count(first), Each<H>::count(first + half)}; }
  GRASSLAND_INLINE V keep(const V& x, const Ints& mask) {
    return {Each<H>::keep(x.low, mask.low), Each<H>::keep(x.high, mask.high)};
  }
  GRASSLAND_INLINE V choose(const Ints& mask, const V& a, const V& b) {
    return {Each<H>::choose(mask.low, a.low, b.low), Each<H>::choose(mask.high, a.high, b.high)};
  }
  GRASSLAND_INLINE V power(const V& x) { return {Each<H>::power(x.low), Each<H>::power(x.high)}; }
};

// Lanes of low and high side by side, by their index.
template <size_t... index, typename V>
GRASSLAND_INLINE V shuffled(const V& low, const V& high) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(low, high, index...);
#else
  return __builtin_shuffle(low, high, typename Each<V>::Bits{index...});
#endif
}

// Lane i of v is lane i ^ step.
template <size_t step, typename V, size_t... lane>
GRASSLAND_INLINE V across(const V& v, std::index_sequence<lane...>) {
  return shuffled<(lane ^ step)...>(v, v);
}

template <size_t step, typename V, typename F>
GRASSLAND_INLINE float reduced_by(const V& v, const F& f) {
  const V folded = f(v, across<step>(v, std::make_index_sequence<kLanesOf<V>>{}));
  if constexpr (step == 1)
    return folded[0];
  else
    return reduced_by<step / 2>(folded, f);
}

// All lanes by a commutative function of two vectors.
template <typename V, typename F>
GRASSLAND_INLINE float reduced(const V& v, const F& f) {
  return reduced_by<kLanesOf<V> / 2>(v, f);
}

template <typename H, typename F>
GRASSLAND_INLINE float reduced(const Pair<H>& v, const F& f) {
  return reduced(f(v.low, v.high), f);
}

template <size_t step, typename V, size_t... lane>
GRASSLAND_INLINE void fold(V* m, std::index_sequence<lane...> lanes) {
  constexpr size_t n = kLanesOf<V>;
  for (size_t i = 0; i < step; ++i) {
    const V low = m[i], high = m[i + step];
    m[i] = shuffled<(lane & step ? lane + n : lane)...>(low, high) +
           shuffled<(lane & step ? lane + n - step : lane + step)...>(low, high);
  }
  if constexpr (step > 1) fold<step / 2>(m, lanes);
}

// Lane i is the total of the i-th of as many vectors as one has lanes; they are used up.
template <typename V>
GRASSLAND_INLINE V totals(V* m) {
  fold<kLanesOf<V> / 2>(m, std::make_index_sequence<kLanesOf<V>>{});
  return m[0];
}

template <typename H>
GRASSLAND_INLINE Pair<H> totals(Pair<H>* m) {
  constexpr int half = kLanesOf<H>;
  H low[half], high[half];
#pragma GCC unroll 8
  for (int i = 0; i < half; ++i) {
    low[i] = m[i].low + m[i].high;
    high[i] = m[half + i].low + m[half + i].high;
  }
  return {totals(low), totals(high)};
}

// Of each four lanes the first two (or last two) of both vectors, `unit` of them in turn.
template <size_t unit, bool last, typename V, size_t... lane>
GRASSLAND_INLINE V zipped(const V& a, const V& b, std::index_sequence<lane...>) {
  return shuffled<(lane / 4 * 4 + last * 2 + lane % 4 / (2 * unit) * unit + lane % unit +
                   lane / unit % 2 * kLanesOf<V>)...>(a, b);
}

// Every second four lanes of the first vector, then those of the second.
template <bool odd, typename V, size_t... lane>
GRASSLAND_INLINE V thinned(const V& a, const V& b, std::index_sequence<lane...>) {
  constexpr size_t n = kLanesOf<V>;
  return shuffled<(lane % (n / 2) / 4 * 8 + odd * 4 + lane % 4 + lane / (n / 2) * n)...>(a, b);
}

// Of a square of as many vectors as one has lanes, by what every processor shuffles in one step: first within four lanes,
// then fours of them.
template <typename V>
GRASSLAND_INLINE void transpose(V* m) {
  constexpr size_t n = kLanesOf<V>;
  constexpr std::make_index_sequence<n> lanes{};
#pragma GCC unroll 4
  for (size_t i = 0; i < n; i += 4) {
    const V a = zipped<1, false>(m[i], m[i + 1], lanes), b = zipped<1, true>(m[i], m[i + 1], lanes);
    const V c = zipped<1, false>(m[i + 2], m[i + 3], lanes), d = zipped<1, true>(m[i + 2], m[i + 3], lanes);
    m[i] = zipped<2, false>(a, c, lanes), m[i + 1] = zipped<2, true>(a, c, lanes);
    m[i + 2] = zipped<2, false>(b, d, lanes), m[i + 3] = zipped<2, true>(b, d, lanes);
  }
  if constexpr (n > 4) {
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) {
      V* const at = m + i;
      const V even = thinned<false>(at[0], at[4], lanes), odd = thinned<true>(at[0], at[4], lanes);
      if constexpr (n == 8) {
        at[0] = even, at[4] = odd;
      } else {
        const V even2 = thinned<false>(at[8], at[12], lanes), odd2 = thinned<true>(at[8], at[12], lanes);
        at[0] = thinned<false>(even, even2, lanes), at[4] = thinned<false>(odd, odd2, lanes);
        at[8] = thinned<true>(even, even2, lanes), at[12] = thinned<true>(odd, odd2, lanes);
      }
    }
  }
}

template <typename H>
GRASSLAND_INLINE void transpose(Pair<H>* m) {
  constexpr int half = kLanesOf<H>;
  H quarter[4][half];
#pragma GCC unroll 8
  for (int i = 0; i < half; ++i) {
    quarter[0][i] = m[i].low;
    quarter[1][i] = m[half + i].low;
    quarter[2][i] = m[i].high;
    quarter[3][i] = m[half + i].high;
  }
#pragma GCC unroll 4
  for (auto& q : quarter) transpose(q);
#pragma GCC unroll 8
  for (int i = 0; i < half; ++i) {
    m[i] = {quarter[0][i], quarter[1][i]};
    m[half + i] = {quarter[2][i], quarter[3][i]};
  }
}

// Up to kLanes numbers, without a call.
template <typename T>
GRASSLAND_INLINE void copy_few(T* to, const T* from, int64_t count) {
  int64_t at = 0;
#pragma GCC unroll 5
  for (int64_t part = kLanes; part >= 1; part /= 2)
    if (count & part) {
      std::memcpy(to + at, from + at, part * sizeof(T));
      at += part;
    }
}

// f(c, live) for each vector of a row; `live` is a constant in all but the last, so that only that one has a tail.
template <typename F>
GRASSLAND_INLINE void for_each_vector(int64_t size, F&& f) {
  int64_t c = 0;
  for (; c + kLanes <= size; c += kLanes) f(c, std::integral_constant<int64_t, kLanes>{});
  if (c < size) f(c, size - c);
}

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
enum class VectorUnit { plain, avx2, avx512 };

// The best that the processor has, or what is asked of PyTorch's kernels: ATEN_CPU_CAPABILITY=default or avx2.
inline VectorUnit best_unit() {
  static const VectorUnit found = [] {
    const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view most = asked == nullptr ? "" : asked;
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!avx2 || most == "default") return VectorUnit::plain;
    return avx512 && most != "avx2" ? VectorUnit::avx512 : VectorUnit::avx2;
  }();
  return found;
}

// The function `f` of the best unit that the processor has, to be called.
#define GRASSLAND_BEST(f)                                  \
  [](auto&&... given) {                                    \
    switch (best_unit()) {                                 \
      case VectorUnit::avx512: return avx512::f(given...); \
      case VectorUnit::avx2: return avx2::f(given...);     \
      default: return plain::f(given...);                  \
    }                                                      \
  }
#else
#define GRASSLAND_BEST(f) [](auto&&... given) { return plain::f(given...); }
#endif

}  // namespace grassland
