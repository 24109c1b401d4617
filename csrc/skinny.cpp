// Products of few rows with a large weight, y = x w^T + bias, where reading the weight is the work, and the weight's gradient,
// where writing it is.
//
// w is read once, in pieces long enough for the memory and its prefetchers: a block is copied into the cache, and the tiles
// on it ask for the next one. The rows of x, transposed into panels of sixteen, are the lanes: each element of w meets a
// panel at a time, so that w may lie either way and is never transposed. Lanes without a row cost nothing, as the memory
// is the slower part.
#include "skinny.h"
#include "vec.h"

#include <memory>
#include <new>

namespace grassland {
namespace {

// A block of w: rows of the output by terms of the sum. Its copy is contiguous along the sum where w is (kLong apart by
// row, a length that spreads over the sets of the cache), else along the rows.
constexpr int64_t kRows = 96, kDepth = 256, kLong = kDepth + kLanes;
constexpr int64_t kWideRows = 384, kWideDepth = 64;
constexpr int64_t kStep = 24;  // the rows of all tiles divide it
constexpr int64_t kBlock = std::max(kRows * kLong, kWideRows * kWideDepth);

struct Free {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer buffer(int64_t size) {
  return Buffer(static_cast<float*>(::operator new[](size * sizeof(float), std::align_val_t(64))));
}

int64_t rounded(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// x in panels: (panel, k, lane), zero in lanes without a row.
GRASSLAND_MULTIARCH void pack(const Product<float>& p, float* panels) {
  for (int64_t first = 0; first < p.n; first += kLanes) {
    const int64_t live = std::min(kLanes, p.n - first);
    float* panel = panels + first * p.k;
    for_each_vector(p.k, [&](int64_t k, auto width) GRASSLAND_INLINE_LAMBDA {
      Vec m[kLanes] = {};
      for (int64_t i = 0; i < live; ++i) m[i] = load(p.x + (first + i) * p.ldx + k, width);
      transpose(m);
      for (int64_t i = 0; i < width; ++i) store_full(m[i], panel + (k + i) * kLanes);
    });
  }
}

// Asks for what the next block, from `next` on, has where a tile of this one reads term k.
template <int R, int term>
GRASSLAND_INLINE void prefetch(const float* next, int64_t ldw, int64_t k) {
  if (next == nullptr) return;
  if (term == 1) {
    const int64_t row = k / kLanes;
    const float* line = next + row * ldw + k % kLanes * kLanes;
    if (row < R) __builtin_prefetch(line, 0, 2);
    if (row + kDepth / kLanes < R) __builtin_prefetch(line + kDepth / kLanes * ldw, 0, 2);
  } else {
    __builtin_prefetch(next + k * ldw, 0, 2);
    if (R > kLanes) __builtin_prefetch(next + k * ldw + kLanes, 0, 2);
  }
}

// Where a tile's sums lie.
struct Sums {
  float* at;
  int64_t row, panel;
};

// Of V panels, c (R, lanes) = or += sum over k of a, whose rows and terms lie `row` and `term` apart, and b (k, lanes).
// Blocks are summed apart before they are added up, which keeps the rounding error of a long sum small.
template <int R, int V, int row, int term>
GRASSLAND_INLINE void tile(const float* a, const float* b, int64_t panel, int64_t depth, const Sums& c, bool add,
                           const float* next, int64_t ldw) {
  Vec sum[R][V];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    prefetch<R, term>(next, ldw, k);
    Vec x[V];
    for (int v = 0; v < V; ++v) x[v] = load_full(b + v * panel + k * kLanes);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] += a[r * row + k * term] * x[v];
  }
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* at = c.at + r * c.row + v * c.panel;
      store_full(add ? load_full(at) + sum[r][v] : sum[r][v], at);
    }
}

template <int R, int V, bool along>
GRASSLAND_INLINE void tiles(const float* a, const float* b, int64_t panel, int64_t rows, int64_t depth, float* c,
                            bool add, const float* next, int64_t ldw) {
  constexpr int row = along ? kLong : 1, term = along ? 1 : kWideRows;
  for (int64_t r = 0; r < rows; r += R)
    tile<R, V, row, term>(a + r * row, b, panel, depth, {c + r * kLanes, kLanes, rows * kLanes}, add,
                          next == nullptr ? next : next + r * (along ? ldw : 1), ldw);
}

template <bool along>
GRASSLAND_INLINE void copy(const float* w, int64_t ldw, int64_t rows, int64_t depth, float* a) {
  const int64_t lines = along ? rows : depth, length = along ? depth : rows, pitch = along ? kLong : kWideRows;
  for (int64_t i = 0; i < lines; ++i)
    for_each_vector(length, [&](int64_t c, auto width) GRASSLAND_INLINE_LAMBDA {
      store_full(load(w + i * ldw + c, width), a + i * pitch + c);
    });
}

// Rows `begin` to `end` of w, all of its terms: y (n, begin .. end).
template <bool along>
GRASSLAND_INLINE void block_body(const Product<float>& p, const float* panels, int64_t begin, int64_t end, bool wide,
                                 float* a, float* c) {
  constexpr int64_t most = along ? kDepth : kWideDepth;
  const int64_t rows = rounded(end - begin, kStep), count = rounded(p.n, kLanes) / kLanes, block = rows * kLanes;
  for (int64_t k = 0; k < p.k; k += most) {
    const int64_t depth = std::min(most, p.k - k), after = k + depth;
    const float* w = p.w + (along ? begin * p.ldw + k : k * p.ldw + begin);
    copy<along>(w, p.ldw, end - begin, depth, a);
    const float* next = after < p.k ? p.w + (along ? begin * p.ldw + after : after * p.ldw + begin)
                        : end < p.m ? p.w + (along ? end * p.ldw : end)
                                    : nullptr;
    for (int64_t panel = 0; panel < count;) {
      const float* b = panels + (panel * p.k + k) * kLanes;
      const float* asked = panel == 0 ? next : nullptr;
      float* sums = c + panel * block;
      if (wide && panel + 1 < count) {
        tiles<12, 2, along>(a, b, p.k * kLanes, rows, depth, sums, k > 0, asked, p.ldw);
        panel += 2;
      } else {
        if (wide)
          tiles<24, 1, along>(a, b, 0, rows, depth, sums, k > 0, asked, p.ldw);
        else
          tiles<6, 1, along>(a, b, 0, rows, depth, sums, k > 0, asked, p.ldw);
        ++panel;
      }
    }
  }
  for (int64_t first = 0; first < p.n; first += kLanes)
    for_each_vector(end - begin, [&](int64_t r, auto width) GRASSLAND_INLINE_LAMBDA {
      Vec m[kLanes] = {};
      for (int64_t i = 0; i < width; ++i) m[i] = load_full(c + first / kLanes * block + (r + i) * kLanes);
      transpose(m);
      const Vec bias = p.bias == nullptr ? Vec{} : load(p.bias + begin + r, width);
      for (int64_t i = 0; i < std::min(kLanes, p.n - first); ++i)
        store(m[i] + bias, p.y + (first + i) * p.m + begin + r, width);
    });
}

GRASSLAND_MULTIARCH void block_along(const Product<float>& p, const float* panels, int64_t begin, int64_t end,
                                     bool wide, float* a, float* c) {
  block_body<true>(p, panels, begin, end, wide, a, c);
}

GRASSLAND_MULTIARCH void block_across(const Product<float>& p, const float* panels, int64_t begin, int64_t end,
                                      bool wide, float* a, float* c) {
  block_body<false>(p, panels, begin, end, wide, a, c);
}

// R rows of w from `first` on, with N rows of x; asks for the next R.
template <int N, int R, typename T>
GRASSLAND_INLINE void few_tile(const Product<T>& p, int64_t first) {
  static_assert(N * R <= kLanes);
  const int64_t rows = std::min<int64_t>(R, p.m - first);
  Vec sum[kLanes] = {};
  for_each_vector(p.k, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    Vec x[N];
    for (int i = 0; i < N; ++i) x[i] = load(p.x + i * p.ldx + c, live);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T* at = p.w + (first + std::min<int64_t>(r, rows - 1)) * p.ldw + c;
      if (sizeof(T) == sizeof(float) || c % (2 * kLanes) == 0) __builtin_prefetch(at + R * p.ldw, 0, 2);
      const Vec w = load(at, live);
      for (int i = 0; i < N; ++i) sum[i * R + r] += w * x[i];
    }
  });
  float lanes[kLanes * kLanes], found[kLanes];
  for (int k = 0; k < kLanes; ++k) store_full(sum[k], lanes + k * kLanes);
  store_full(totals(lanes), found);
  for (int i = 0; i < N; ++i)
    for (int64_t r = 0; r < rows; ++r) {
      const float bias = p.bias == nullptr ? 0.0f : to_float(p.bias[first + r]);
      from_float(found[i * R + r] + bias, p.y[i * p.m + first + r]);
    }
}

template <int N, int R, typename T>
GRASSLAND_INLINE void few_tiles(const Product<T>& p, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += R) few_tile<N, R>(p, first);
}

template <typename T>
GRASSLAND_INLINE void few_body(const Product<T>& p, int64_t begin, int64_t end) {
  switch (p.n) {
    case 1: return few_tiles<1, 8>(p, begin, end);
    case 2: return few_tiles<2, 8>(p, begin, end);
    case 3: return few_tiles<3, 4>(p, begin, end);
    default: return few_tiles<4, 4>(p, begin, end);
  }
}

#define GRASSLAND_FEW(T)                                                                       \
  GRASSLAND_MULTIARCH void few_rows(const Product<T>& p, int64_t begin, int64_t end) {         \
    few_body(p, begin, std::min(end, p.m));                                                    \
  }
GRASSLAND_FEW(float)
GRASSLAND_FEW(bf16)

template <typename T>
void few_of(const Product<T>& p) {
  // Numbers of w that are worth a thread.
  constexpr int64_t kShare = 1 << 15, kTall = 8;
  const int64_t grain = kShare / (kTall * p.k) + 1;
  torch::stable::parallel_for(0, rounded(p.m, kTall) / kTall, grain, [&](int64_t begin, int64_t end) {
    few_rows(p, begin * kTall, end * kTall);
  });
}

// w (m, h) = or += g^T x for g (n, m), x in panels (panel, n, lane).
template <typename T>
struct Outer {
  const T *g, *x;
  const float* panels;
  float* w;
  int64_t n, m, h;
  bool add;
};

template <typename T>
GRASSLAND_INLINE void pack_columns_body(const Outer<T>& p, int64_t begin, int64_t end, float* panels) {
  for (int64_t c = begin * kLanes; c < std::min(end * kLanes, p.h); c += kLanes)
    for (int64_t i = 0; i < p.n; ++i)
      store_full(load(p.x + i * p.h + c, std::min(kLanes, p.h - c)), panels + c * p.n + i * kLanes);
}

// Rows `first` to `first` + R of w. Where a tile reaches over an edge, its sums go by way of a copy.
template <int R, int V, typename T>
GRASSLAND_INLINE void outer_rows(const Outer<T>& p, int64_t first) {
  const int64_t rows = std::min<int64_t>(R, p.m - first);
  float a[kSkinny * R] = {};
  for (int64_t i = 0; i < p.n; ++i)
    for (int64_t r = 0; r < rows; ++r) a[i * R + r] = to_float(p.g[i * p.m + first + r]);
  for (int64_t c = 0; c < p.h; c += V * kLanes) {
    const float* b = p.panels + c * p.n;
    float* w = p.w + first * p.h + c;
    const int64_t width = std::min(V * kLanes, p.h - c);
    if (rows == R && width == V * kLanes) {
      tile<R, V, 1, R>(a, b, p.n * kLanes, p.n, {w, p.h, kLanes}, p.add, nullptr, 0);
      continue;
    }
    float edge[R * V * kLanes] = {};
    for (int64_t r = 0; p.add && r < rows; ++r) std::memcpy(edge + r * V * kLanes, w + r * p.h, width * sizeof(float));
    tile<R, V, 1, R>(a, b, p.n * kLanes, p.n, {edge, V * kLanes, kLanes}, p.add, nullptr, 0);
    for (int64_t r = 0; r < rows; ++r) std::memcpy(w + r * p.h, edge + r * V * kLanes, width * sizeof(float));
  }
}

template <typename T>
GRASSLAND_INLINE void outer_body(const Outer<T>& p, int64_t begin, int64_t end, bool wide) {
  if (wide)
    for (int64_t t = begin; t < end; ++t) outer_rows<12, 2>(p, t * 12);
  else
    for (int64_t t = begin; t < end; ++t) outer_rows<6, 1>(p, t * 6);
}

#define GRASSLAND_OUTER(T)                                                                                          \
  GRASSLAND_MULTIARCH void pack_columns(const Outer<T>& p, int64_t begin, int64_t end, float* panels) {             \
    pack_columns_body(p, begin, end, panels);                                                                       \
  }                                                                                                                 \
  GRASSLAND_MULTIARCH void outer_range(const Outer<T>& p, int64_t begin, int64_t end, bool wide) {                  \
    outer_body(p, begin, end, wide);                                                                                \
  }
GRASSLAND_OUTER(float)
GRASSLAND_OUTER(bf16)

// Whether there are thirty-two vector registers, so that a tile may have twenty-four sums.
bool many_registers() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

template <typename T>
void outer(const Tensor& w, const Tensor& g, const Tensor& x, bool add) {
  Outer<T> p{data<T>(g), data<T>(x), nullptr, data<float>(w), g.size(0), g.size(1), x.size(1), add};
  const bool wide = many_registers();
  const int64_t step = wide ? 12 : 6, count = rounded(p.h, 2 * kLanes) / kLanes;
  const Buffer panels = buffer(count * kLanes * p.n);
  torch::stable::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    pack_columns(p, begin, end, panels.get());
  });
  p.panels = panels.get();
  torch::stable::parallel_for(0, rounded(p.m, step) / step, 4, [&](int64_t begin, int64_t end) {
    outer_range(p, begin, end, wide);
  });
}

}  // namespace

void few(const Product<float>& p) { few_of(p); }
void few(const Product<bf16>& p) { few_of(p); }

bool skinny_fits(const Tensor& x, const Tensor& w) {
  if (x.scalar_type() != ScalarType::Float || x.numel() == 0 || x.stride(1) != 1) return false;
  if (x.size(0) <= kFew && w.stride(1) == 1) return w.numel() >= kFewLarge;
  return x.size(0) <= kSkinny && w.numel() >= kLarge && (w.stride(1) == 1 || w.stride(0) == 1);
}

Tensor skinny(const Tensor& x, const Tensor& w, const Tensor* bias) {
  const Tensor y = empty(x, {x.size(0), w.size(0)}, ScalarType::Float);
  const Product<float> p = product_of<float>(x, w, bias, y);
  if (p.n <= kFew && p.along) {
    few(p);
    return y;
  }
  const bool wide = many_registers();
  const Buffer panels = buffer(rounded(p.n, kLanes) * p.k);
  pack(p, panels.get());
  const int64_t share = rounded(p.m, torch::stable::get_num_threads()) / torch::stable::get_num_threads();
  const int64_t rows = std::clamp(rounded(share, kStep), kStep, p.along ? kRows : kWideRows);
  torch::stable::parallel_for(0, rounded(p.m, rows) / rows, 1, [&](int64_t first, int64_t last) {
    const Buffer a = buffer(kBlock), c = buffer(rounded(p.n, kLanes) * rows);
    std::memset(a.get(), 0, kBlock * sizeof(float));
    for (int64_t b = first; b < last; ++b)
      (p.along ? block_along : block_across)(p, panels.get(), b * rows, std::min((b + 1) * rows, p.m), wide, a.get(),
                                             c.get());
  });
  return y;
}

void skinny_outer(const Tensor& w, const Tensor& g, const Tensor& x, bool add) {
  (g.scalar_type() == ScalarType::Float ? outer<float> : outer<bf16>)(w, g, x, add);
}

}  // namespace grassland
