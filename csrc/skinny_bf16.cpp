// Products of few rows in bfloat16, y = x w^T + bias and the weight's gradient g^T x, for processors whose vectors multiply
// pairs of bfloat16 (AVX512_BF16) and that have no tiles (AMX), which are faster.
//
// A lane adds the products of a pair: two neighbours in the sum are one word. The rows' words are broadcast, and the other
// factor is laid out in panels (pair, column): a weight a block at a time, which stays in the first cache, while the memory
// is asked for the next. A library does so too, but its preparations take 10 us, as long as all of a product of 16 rows
// with 192 x 768.
#include "skinny.h"
#include "vec.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 11 : __GNUC__ >= 10)
#define GRASSLAND_HAS_PAIRS
#include <cpuid.h>
#include <immintrin.h>

#include <memory>
#endif

namespace grassland {

#ifdef GRASSLAND_HAS_PAIRS
#define GRASSLAND_PAIRS __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define GRASSLAND_PAIRS_INLINE GRASSLAND_PAIRS __attribute__((always_inline)) inline
// Registers are allotted well to one tile at a time only.
#define GRASSLAND_PAIRS_APART GRASSLAND_PAIRS __attribute__((noinline))
namespace {

using Vec = Register<float, kLanes>::type;

// A tile is at most kTile rows by four vectors of columns; a block of w has kDepth terms of the sum.
constexpr int64_t kTile = 6, kVectors = 4, kPanel = kVectors * kLanes, kDepth = 256;
constexpr int64_t kStep = 8;             // terms between two looks ahead
constexpr int64_t kStripe = 16 * kTile;  // rows of a gradient whose factor is laid out at a time
constexpr int64_t kMost = 256;           // rows of a product: beyond, a library is as fast
constexpr int64_t kLeast = 1 << 14;      // numbers of a weight

bool has_pairs() {
  static const bool found = [] {
    unsigned a, b, c, d;
    return multiplies_halves() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) == 0;  // AMX-BF16
  }();
  return found;
}

GRASSLAND_PAIRS_INLINE __mmask32 first_halves(int64_t live) {
  return live >= 32 ? ~__mmask32{0} : live <= 0 ? __mmask32{0} : (__mmask32{1} << live) - 1;
}

GRASSLAND_PAIRS_INLINE __mmask16 first_lanes(int64_t live) {
  return live >= kLanes ? ~__mmask16{0} : live <= 0 ? __mmask16{0} : static_cast<__mmask16>((1u << live) - 1);
}

// Rows 2 p and 2 p + 1 of from (n, width) become row p of to (pairs, columns), zero beyond n and width.
GRASSLAND_PAIRS_APART void pair_rows(const bf16* from, int64_t ld, int64_t n, int64_t width, int64_t columns,
                                     uint32_t* to) {
  // Lane i takes half i of the first row and half i of the second, whose halves count from 32.
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i low = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(32)), 16));
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(16 << 16 | 16));
  for (int64_t i = 0; i < n; i += 2, to += columns) {
    const bf16* row = from + i * ld;
    for (int64_t c = 0; c < columns; c += 32) {
      const __mmask32 live = first_halves(width - c);
      const __m512i a = _mm512_maskz_loadu_epi16(live, row + c);
      const __m512i b = _mm512_maskz_loadu_epi16(i + 1 < n ? live : 0, row + ld + c);
      _mm512_storeu_si512(to + c, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(to + c + kLanes, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

// Neighbours of a row of from (width, depth) become words: to (depth / 2, kPanel), zero beyond width.
template <bool whole>
GRASSLAND_PAIRS_INLINE void turn_square(const bf16* from, int64_t ld, int64_t width, int64_t depth, uint32_t* to) {
  const __mmask32 live = first_halves(depth);
  Vec m[kLanes];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i, from += ld)
    m[i] = (Vec)(whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(i < width ? live : 0, from));
  transpose(m);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i)
    if (whole || 2 * i < depth) _mm512_storeu_ps(to + i * kPanel, (__m512)m[i]);
}

GRASSLAND_PAIRS_APART void turn_pairs(const bf16* from, int64_t ld, int64_t width, int64_t depth, uint32_t* to) {
  for (int64_t v = 0; v < kPanel; v += kLanes, from += kLanes * ld)
    for (int64_t k = 0; k < depth; k += 2 * kLanes)
      if (v + kLanes <= width && k + 2 * kLanes <= depth)
        turn_square<true>(from + k, ld, kLanes, 2 * kLanes, to + k / 2 * kPanel + v);
      else
        turn_square<false>(from + k, ld, width - v, depth - k, to + k / 2 * kPanel + v);
}

// Sums of R rows and kVectors vectors of columns.
template <int R>
using Tile = __m512[R][kVectors];

// += over pairs of a, whose rows and pairs lie so many bytes apart, and b (pair, kPanel).
template <int R>
GRASSLAND_PAIRS_INLINE void multiply(const char* a, int64_t row, int64_t step, const uint32_t* b, int64_t pairs,
                                     Tile<R>& sum) {
  const char* at[R];
  for (int r = 0; r < R; ++r) at[r] = a + r * row;
  for (int64_t p = 0, offset = 0; p < pairs; ++p, offset += step) {
    __m512bh columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = (__m512bh)_mm512_loadu_si512(b + p * kPanel + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      int32_t word;
      std::memcpy(&word, at[r] + offset, sizeof(word));
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(word);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], pair, columns[v]);
    }
  }
}

template <int R>
GRASSLAND_PAIRS_INLINE void put_tile(const Tile<R>& sum, bf16* to, int64_t ld, int64_t width) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v += 2)
      _mm512_mask_storeu_epi16(to + r * ld + v * kLanes, first_halves(width - v * kLanes),
                               (__m512i)_mm512_cvtne2ps_pbh(sum[r][v + 1], sum[r][v]));
}

template <int R>
GRASSLAND_PAIRS_INLINE void put_tile(const Tile<R>& sum, float* to, int64_t ld, int64_t width) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      _mm512_mask_storeu_ps(to + r * ld + v * kLanes, first_lanes(width - v * kLanes), sum[r][v]);
}

template <int R>
GRASSLAND_PAIRS_INLINE void take_tile(const float* from, int64_t ld, int64_t width, Tile<R>& sum) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sum[r][v] = _mm512_maskz_loadu_ps(first_lanes(width - v * kLanes), from + r * ld + v * kLanes);
}

// use(first, R) for tiles of rows as even as can be, R a constant.
template <template <int> class Use, typename... Args>
GRASSLAND_PAIRS_INLINE void each_tile(int64_t n, const Args&... args) {
  const int64_t count = (n + kTile - 1) / kTile;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t first = t * n / count, rows = (t + 1) * n / count - first;
    switch (rows) {
      case 1: Use<1>::run(first, args...); break;
      case 2: Use<2>::run(first, args...); break;
      case 3: Use<3>::run(first, args...); break;
      case 4: Use<4>::run(first, args...); break;
      case 5: Use<5>::run(first, args...); break;
      default: Use<6>::run(first, args...);
    }
  }
}

// One block of terms of a panel of columns.
struct Block {
  const uint32_t* words;
  int64_t column, width, term, depth;
  float* sums;  // (n, kPanel), of the blocks before
  Ahead* ahead;
};

template <int R>
struct LinearTile {
  GRASSLAND_PAIRS_APART static void run(int64_t first, const Product<bf16>& p, const Block& b) {
    Tile<R> sum;
    if (b.term > 0)
      take_tile<R>(b.sums + first * kPanel, kPanel, kPanel, sum);
    else
      for (int v = 0; v < kVectors; ++v) {
        __m256i bias = _mm256_setzero_si256();
        if (p.bias != nullptr)
          bias = _mm256_maskz_loadu_epi16(first_lanes(b.width - v * kLanes), p.bias + b.column + v * kLanes);
        for (int r = 0; r < R; ++r) sum[r][v] = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bias), 16);
      }
    for (int64_t k = 0; k < b.depth; k += kStep) {
      b.ahead->ask();
      multiply<R>(reinterpret_cast<const char*>(p.x + first * p.ldx + b.term + k), p.ldx * 2, 4,
                  b.words + k / 2 * kPanel, std::min(kStep, b.depth - k) / 2, sum);
    }
    if (b.term + b.depth < p.k)
      put_tile<R>(sum, b.sums + first * kPanel, kPanel, kPanel);
    else
      put_tile<R>(sum, p.y + first * p.m + b.column, p.m, b.width);
  }
};

GRASSLAND_PAIRS void linear_panels(const Product<bf16>& p, int64_t begin, int64_t end) {
  alignas(64) uint32_t words[kDepth / 2 * kPanel];
  const std::unique_ptr<float[]> sums(p.k > kDepth ? new float[p.n * kPanel] : nullptr);
  const int64_t last = std::min(end * kPanel, p.m);
  for (int64_t column = begin * kPanel, term = 0; column < last;) {
    const int64_t width = std::min(kPanel, p.m - column), depth = std::min(kDepth, p.k - term);
    if (p.along)
      turn_pairs(p.w + column * p.ldw + term, p.ldw, width, depth, words);
    else
      pair_rows(p.w + term * p.ldw + column, p.ldw, depth, width, kPanel, words);
    const bool more = term + depth < p.k;
    const int64_t next_column = more ? column : column + kPanel, next_term = more ? term + depth : 0;
    const int64_t looks = (p.n + kTile - 1) / kTile * ((depth + kStep - 1) / kStep);
    Ahead ahead = look_ahead(p, next_column < last ? next_column : p.m, next_term, kPanel, kDepth, looks);
    each_tile<LinearTile>(p.n, p, Block{words, column, width, term, depth, sums.get(), &ahead});
    column = next_column;
    term = next_term;
  }
}

// w (m, h) = or += g^T x
template <typename T>
struct Outer {
  const bf16 *g, *x;  // (n, m), (n, h)
  T* w;
  int64_t n, m, h, ldw;
  bool add;
};

template <int R>
struct OuterTile {
  template <typename T>
  GRASSLAND_PAIRS_APART static void run(int64_t first, const Outer<T>& p, const uint32_t* rows, const uint32_t* panels,
                                        T* w) {
    const int64_t pairs = (p.n + 1) / 2;
    for (int64_t c = 0; c < p.h; c += kPanel) {
      const int64_t width = std::min(kPanel, p.h - c);
      T* to = w + first * p.ldw + c;
      Tile<R> sum;
      const bool add = std::is_same_v<T, float> && p.add;
      if constexpr (std::is_same_v<T, float>)
        if (add) take_tile<R>(to, p.ldw, width, sum);
      if (!add)
        for (auto& row : sum)
          for (auto& v : row) v = _mm512_setzero_ps();
      multiply<R>(reinterpret_cast<const char*>(rows + first), 4, kStripe * 4, panels + c * pairs, pairs, sum);
      put_tile<R>(sum, to, p.ldw, width);
    }
  }
};

// Stripes `begin` to `end` of w; x in panels (panel, pair, kPanel).
template <typename T>
GRASSLAND_PAIRS void outer_stripes(const Outer<T>& p, const uint32_t* panels, int64_t begin, int64_t end) {
  alignas(64) uint32_t words[kMost / 2 * kStripe];
  for (int64_t first = begin * kStripe; first < std::min(end * kStripe, p.m); first += kStripe) {
    const int64_t rows = std::min(kStripe, p.m - first);
    pair_rows(p.g + first, p.m, p.n, rows, kStripe, words);
    each_tile<OuterTile>(rows, p, words, panels, p.w + first * p.ldw);
  }
}

template <typename T>
void outer(const Outer<T>& p) {
  const int64_t pairs = (p.n + 1) / 2, count = (p.h + kPanel - 1) / kPanel;
  const std::unique_ptr<uint32_t[]> panels(new uint32_t[count * kPanel * pairs]);
  torch::stable::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * kPanel; c < std::min(end * kPanel, p.h); c += kPanel)
      pair_rows(p.x + c, p.h, p.n, p.h - c, kPanel, panels.get() + c * pairs);
  });
  torch::stable::parallel_for(0, (p.m + kStripe - 1) / kStripe, 1, [&](int64_t begin, int64_t end) {
    outer_stripes(p, panels.get(), begin, end);
  });
}

}  // namespace

bool skinny_bf16_fits(const Tensor& x, const Tensor& w) {
  return is_half(x) && x.numel() > 0 && x.size(0) <= kMost && x.size(1) % 2 == 0 &&
         w.numel() >= kLeast && x.stride(1) == 1 && (w.stride(1) == 1 || w.stride(0) == 1) && has_pairs();
}

Tensor skinny_bf16(const Tensor& x, const Tensor& w, const Tensor* bias) {
  const Tensor y = empty(x, {x.size(0), w.size(0)}, ScalarType::BFloat16);
  const Product<bf16> p = product_of<bf16>(x, w, bias, y);
  if (p.n <= kFewHalves && p.along) {
    few(p);
    return y;
  }
  torch::stable::parallel_for(0, (p.m + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    linear_panels(p, begin, end);
  });
  return y;
}

bool skinny_bf16_outer_fits(const Tensor& g, const Tensor& x) {
  return is_half(g) && g.numel() > 0 && g.size(0) <= kMost &&
         g.size(1) * x.size(1) >= kLeast && has_pairs();
}

void skinny_bf16_outer(const Tensor& w, const Tensor& g, const Tensor& x, bool add) {
  const auto run = [&](auto* to) {
    outer<std::remove_pointer_t<decltype(to)>>(
        {data<bf16>(g), data<bf16>(x), to, g.size(0), g.size(1), x.size(1), w.stride(0), add});
  };
  w.scalar_type() == ScalarType::Float ? run(data<float>(w)) : run(data<bf16>(w));
}
#else
bool skinny_bf16_fits(const Tensor&, const Tensor&) { return false; }
Tensor skinny_bf16(const Tensor& x, const Tensor&, const Tensor*) { return x; }
bool skinny_bf16_outer_fits(const Tensor&, const Tensor&) { return false; }
void skinny_bf16_outer(const Tensor&, const Tensor&, const Tensor&, bool) {}
#endif

}  // namespace grassland
