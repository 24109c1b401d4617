// Products in bfloat16, y = x w^T + bias and the weight's gradient g^T x, for processors whose vectors multiply pairs of
// bfloat16 (AVX512_BF16) and that have no tiles (AMX), which are faster.
//
// A lane adds the products of a pair: two neighbours in the sum are one word. The rows' words are broadcast, and the other
// factor is laid out in panels (pair, column): a weight a block at a time, which stays in the first cache, while the memory
// is asked for the next.
#include "tiles.h"
#include "vec.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 11 : __GNUC__ >= 10)
#define GRASSLAND_HAS_PAIRS
#include <cpuid.h>
#include <immintrin.h>
#include <unistd.h>
#endif

namespace grassland {

#ifdef GRASSLAND_HAS_PAIRS
#define GRASSLAND_PAIRS __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define GRASSLAND_PAIRS_INLINE GRASSLAND_PAIRS __attribute__((always_inline)) inline
// Registers are allotted well to one tile at a time only.
#define GRASSLAND_PAIRS_APART GRASSLAND_PAIRS __attribute__((noinline))
namespace {

using Vec = Register<float, kLanes>::type;

// A tile is at most kTile rows by four vectors of columns; a block of w has kDepth terms of the sum at most.
constexpr int64_t kTile = 6, kVectors = 4, kPanel = kVectors * kLanes, kDepth = 512;
constexpr int64_t kStep = 8;             // terms between two looks ahead
constexpr int64_t kStripe = 16 * kTile;  // rows of a gradient whose factor is laid out at a time
static_assert(kPanel == kColumns);

bool has_pairs() {
  static const bool found = [] {
    unsigned a, b, c, d;
    return multiplies_halves() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) == 0;  // AMX-BF16
  }();
  return found;
}

// Terms of a block. Half of kDepth stay in a first cache of 48 KiB, as Zen 5 has, with the rows that they meet. In 32, as
// Zen 4 has, they do not, and all of kDepth are 2 to 4 % faster: fewer sums are put aside.
int64_t block_depth() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const int64_t size = sysconf(_SC_LEVEL1_DCACHE_SIZE), found = size > 0 && size < 48 << 10 ? kDepth : kDepth / 2;
  return found;
#else
  return kDepth / 2;
#endif
}

GRASSLAND_PAIRS_INLINE __mmask32 first_halves(int64_t live) {
  return live >= 32 ? ~__mmask32{0} : live <= 0 ? __mmask32{0} : (__mmask32{1} << live) - 1;
}

GRASSLAND_PAIRS_INLINE __mmask16 first_lanes(int64_t live) {
  return live >= kLanes ? ~__mmask16{0} : live <= 0 ? __mmask16{0} : static_cast<__mmask16>((1u << live) - 1);
}

GRASSLAND_PAIRS_INLINE __m512 widened(__mmask16 live, const bf16* from) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, from)), 16);
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
  const int64_t count = parts(n, kTile);
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
        const __mmask16 live = first_lanes(b.width - v * kLanes);
        const int64_t column = b.column + v * kLanes;
        const __m512 bias = p.bias == nullptr ? _mm512_setzero_ps() : widened(live, p.bias + column);
        for (int r = 0; r < R; ++r)
          sum[r][v] = p.add ? bias + widened(live, p.y + (first + r) * p.m + column) : bias;
      }
    const bool ends = b.term + b.depth == p.k;
    // The lines of y, in short pieces far apart
    for (int r = 0; ends && r < R; ++r)
      for (int64_t c = 0; c < kPanel; c += 32) __builtin_prefetch(p.y + (first + r) * p.m + b.column + c, 1, 3);
    for (int64_t k = 0; k < b.depth; k += kStep) {
      b.ahead->ask();
      multiply<R>(reinterpret_cast<const char*>(p.x + first * p.ldx + b.term + k), p.ldx * 2, 4,
                  b.words + k / 2 * kPanel, std::min(kStep, b.depth - k) / 2, sum);
    }
    ends ? put_tile<R>(sum, p.y + first * p.m + b.column, p.m, b.width)
         : put_tile<R>(sum, b.sums + first * kPanel, kPanel, kPanel);
  }
};

// Outputs `begin` to `end`, of which a block has kPanel.
GRASSLAND_PAIRS void linear_panels(const Product<bf16>& p, int64_t begin, int64_t end) {
  alignas(64) uint32_t words[kDepth / 2 * kPanel];
  const int64_t most = block_depth();
  const Buffer<float> sums = p.k > most ? buffer<float>(p.n * kPanel) : nullptr;
  for (int64_t column = begin, term = 0; column < end;) {
    const int64_t width = std::min(kPanel, p.m - column), depth = std::min(most, p.k - term);
    if (p.along)
      turn_pairs(p.w + column * p.ldw + term, p.ldw, width, depth, words);
    else
      pair_rows(p.w + term * p.ldw + column, p.ldw, depth, width, kPanel, words);
    const bool more = term + depth < p.k;
    const int64_t next_column = more ? column : column + kPanel, next_term = more ? term + depth : 0;
    const int64_t looks = parts(p.n, kTile) * parts(depth, kStep);
    Ahead ahead = look_ahead(p, next_column, next_term, kPanel, most, looks);
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

// One block of terms of panels of columns, for a stripe of rows.
struct Strip {
  const uint32_t *rows, *panels;
  int64_t first, left, right, panel, pairs;  // words from one panel to the next
  float* sums;                               // (kStripe, kPanel), of the blocks before
  bool begins, ends;
  Ahead* ahead;
};

template <int R>
struct OuterTile {
  template <typename T>
  GRASSLAND_PAIRS_APART static void run(int64_t row, const Outer<T>& p, const Strip& b) {
    const uint32_t* panel = b.panels;
    for (int64_t c = b.left; c < b.right; c += kPanel, panel += b.panel) {
      const int64_t width = std::min(kPanel, b.right - c);
      T* to = p.w + (b.first + row) * p.ldw + c;
      float* held = b.sums + row * kPanel;
      Tile<R> sum;
      bool taken = !b.begins;
      if (taken) take_tile<R>(held, kPanel, kPanel, sum);
      if constexpr (std::is_same_v<T, float>)
        if (!taken && (taken = p.add)) take_tile<R>(to, p.ldw, width, sum);
      if (!taken)
        for (auto& sums : sum)
          for (auto& v : sums) v = _mm512_setzero_ps();
      for (int64_t k = 0; k < b.pairs; k += kStep) {
        b.ahead->ask();
        multiply<R>(reinterpret_cast<const char*>(b.rows + k * kStripe + row), 4, kStripe * 4, panel + k * kPanel,
                    std::min(kStep, b.pairs - k), sum);
      }
      b.ends ? put_tile<R>(sum, to, p.ldw, width) : put_tile<R>(sum, held, kPanel, kPanel);
    }
  }
};

// A stripe of w from row `first` on, of columns `left` to `right`: more than a panel only of few terms.
template <typename T>
GRASSLAND_PAIRS_INLINE void outer_stripe(const Outer<T>& p, const uint32_t* rows, const uint32_t* panels, int64_t first,
                                         int64_t end, int64_t left, int64_t right, Ahead& ahead) {
  alignas(64) float sums[kStripe * kPanel];
  const int64_t pairs = parts(p.n, 2), count = std::min(kStripe, end - first), most = block_depth() / 2;
  for (int64_t base = 0; base < pairs; base += most) {
    const int64_t depth = std::min(most, pairs - base);
    each_tile<OuterTile>(count, p, Strip{rows + base * kStripe, panels + base * kPanel, first, left, right, kPanel * pairs,
                                         depth, sums, base == 0, base + depth == pairs, &ahead});
  }
}

// How often a stripe by a panel asks.
inline int64_t looks(int64_t rows, int64_t terms) { return parts(rows, kTile) * parts(terms, 2 * kStep); }

// Rows `begin` to `end` of w, of columns `left` to `right`, a multiple of kPanel and one or the last; x in panels (panel,
// pair, kPanel).
template <typename T>
GRASSLAND_PAIRS void outer_rows(const Outer<T>& p, const uint32_t* panels, int64_t begin, int64_t end, int64_t left,
                                int64_t right) {
  const int64_t pairs = parts(p.n, 2);
  const Buffer<uint32_t> words = buffer<uint32_t>(pairs * kStripe);
  // All panels of few terms stay in the cache, and w is written row by row.
  const int64_t strip = p.n <= kFewRows ? right - left : kPanel;
  for (int64_t first = begin; first < end; first += kStripe) {
    const int64_t rows = std::min(kStripe, end - first), next = first + kStripe;
    pair_rows(p.g + first, p.m, p.n, rows, kStripe, words.get());
    Ahead ahead = ahead_of(p.g + next, p.m, next < end ? p.n : 0, std::min(kStripe, end - next),
                           parts(right - left, kPanel) * looks(rows, p.n));
    for (int64_t c = left; c < right; c += strip)
      outer_stripe(p, words.get(), panels + c * pairs, first, end, c, std::min(c + strip, right), ahead);
  }
}

// Columns `left` to `right` of w, a multiple of kPanel and one or the last; g in stripes (stripe, pair, kStripe).
template <typename T>
GRASSLAND_PAIRS void outer_columns(const Outer<T>& p, const uint32_t* stripes, int64_t left, int64_t right) {
  const int64_t pairs = parts(p.n, 2);
  const Buffer<uint32_t> panel = buffer<uint32_t>(pairs * kPanel);
  for (int64_t c = left; c < right; c += kPanel) {
    const int64_t next = c + kPanel;
    pair_rows(p.x + c, p.h, p.n, p.h - c, kPanel, panel.get());
    Ahead ahead = ahead_of(p.x + next, p.h, next < right ? p.n : 0, std::min(kPanel, right - next), looks(p.m, p.n));
    for (int64_t first = 0; first < p.m; first += kStripe)
      outer_stripe(p, stripes + first * pairs, panel.get(), first, p.m, c, std::min(next, right), ahead);
  }
}

// The smaller factor is laid out as a whole, unless there are so few terms that all of x stays in the cache.
template <typename T>
void outer(const Outer<T>& p) {
  const int64_t pairs = parts(p.n, 2), rows = parts(p.m, kTile), columns = parts(p.h, kPanel);
  const bool wide = p.h > p.m, by_columns = wide && p.n > kFewRows;
  const int64_t step = by_columns ? kStripe : kPanel, count = parts(by_columns ? p.m : p.h, step);
  const Buffer<uint32_t> laid_out = buffer<uint32_t>(count * step * pairs);
  constexpr int64_t kTerms = 256;  // that are laid out at a time
  const int64_t blocks = parts(p.n, kTerms), grain = std::max<int64_t>(1, kShare / (kTerms * step));
  torch::stable::parallel_for(0, count * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i / blocks * step, term = i % blocks * kTerms, terms = std::min(kTerms, p.n - term);
      uint32_t* to = laid_out.get() + at * pairs + term / 2 * step;
      by_columns ? pair_rows(p.g + term * p.m + at, p.m, terms, p.m - at, step, to)
                 : pair_rows(p.x + term * p.h + at, p.h, terms, p.h - at, step, to);
    }
  });
  torch::stable::parallel_for(0, wide ? columns : rows, 1, [&](int64_t begin, int64_t end) {
    const int64_t left = begin * kPanel, right = std::min(end * kPanel, p.h);
    if (by_columns)
      outer_columns(p, laid_out.get(), left, right);
    else if (wide)
      outer_rows(p, laid_out.get(), 0, p.m, left, right);
    else
      outer_rows(p, laid_out.get(), begin * kTile, std::min(end * kTile, p.m), 0, p.h);
  });
}

}  // namespace

bool paired_fits(const Tensor& x, const Tensor& w) {
  return is_half(x) && x.numel() > 0 && x.size(1) % 2 == 0 && w.numel() >= kSmall && x.stride(1) == 1 &&
         (w.stride(1) == 1 || w.stride(0) == 1) && has_pairs();
}

void paired(const Tensor& y, const Tensor& x, const Tensor& w, const Tensor* bias, bool add) {
  const Product<bf16> p = product_of<bf16>(y, x, w, bias, add);
  if (p.n <= kFewHalves && p.along) return few(p);
  each_part(p.n, p.m, divided(p.n, p.m, kPanel), [&](int64_t row, int64_t rows, int64_t output, int64_t end) {
    Product<bf16> part = p;
    part.n = rows;
    part.x += row * p.ldx;
    part.y += row * p.m;
    linear_panels(part, output, end);
  });
}

bool paired_outer_fits(const Tensor& g, const Tensor& x) {
  return is_half(g) && g.numel() > 0 && g.size(1) * x.size(1) >= kSmallOuter && has_pairs();
}

void paired_outer(const Tensor& w, const Tensor& g, const Tensor& x, bool add) {
  each_share(w, g, x, add, [](const Tensor& w, const Tensor& g, const Tensor& x, bool add) {
    const auto run = [&](auto* to) {
      outer<std::remove_pointer_t<decltype(to)>>(
          {data<bf16>(g), data<bf16>(x), to, g.size(0), g.size(1), x.size(1), w.stride(0), add});
    };
    is_half(w) ? run(data<bf16>(w)) : run(data<float>(w));
  });
}
#else
bool paired_fits(const Tensor&, const Tensor&) { return false; }
void paired(const Tensor&, const Tensor&, const Tensor&, const Tensor*, bool) {}
bool paired_outer_fits(const Tensor&, const Tensor&) { return false; }
void paired_outer(const Tensor&, const Tensor&, const Tensor&, bool) {}
#endif

}  // namespace grassland
