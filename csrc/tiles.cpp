// Products in float32 by tiles of registers: y = x w^T + bias, and a weight's gradient w = g^T x. Of bfloat16, they widen
// what they read.
//
// A block of w at a time is laid out in panels (term, lane) of sixteen outputs in the cache, while the memory is asked for
// the next. A tile has a few rows of x, whose numbers are broadcast, and a few panels.
#include "tiles.h"
#include "vec.h"

namespace grassland {
namespace {

// A block of w has kTerms terms of kColumns outputs if w is contiguous along the sum; else of more, kWideTerms of as many as
// kWideColumns, which are read in longer pieces.
constexpr int64_t kTerms = 128, kWideColumns = 384, kWideTerms = 64;
constexpr int64_t kBlock = std::max(kColumns * kTerms, kWideColumns * kWideTerms);

// From one panel of a block to the next: a little more than its terms, or those of one term would share a set of the cache.
constexpr int64_t apart(int64_t terms) { return (terms + 1) * kLanes; }

constexpr int64_t kTile = 6;  // rows of x
constexpr int64_t kLook = 8;  // terms between two looks ahead

// Of a gradient: kDeep terms of kStripe rows or kStrip columns lie in the cache, and kChunk terms of the other factor are
// laid out at a time. kStep rows are a whole number of tiles of any unit, kPair columns one.
constexpr int64_t kDeep = 256, kStripe = 96, kStrip = 128, kChunk = 1024, kStep = 12, kPair = 2 * kLanes;

// w (m, h) = or += g^T x for g (n, m) and x (n, h), one of which is laid out: g in tiles (tile, n, row), or x in panels
// (panel, n, lane).
template <typename T>
struct Outer {
  const T *g, *x;
  const float* laid_out;
  float* w;
  int64_t n, m, h, ldw;
  bool add;
};

#define GRASSLAND_SOURCE "tiles_rows.h"
#include "units.h"

template <typename T>
void few_of(const Product<T>& p) {
  constexpr int64_t kTall = 8;
  const int64_t grain = kShare / (kTall * p.k) + 1;
  torch::stable::parallel_for(0, parts(p.m, kTall), grain, [&](int64_t begin, int64_t end) {
    GRASSLAND_BEST(few_rows)(p, begin * kTall, std::min(end * kTall, p.m));
  });
}

template <typename T>
void product(const Product<T>& p) {
  if (p.along && p.n <= GRASSLAND_BEST(most_few)()) return few_of(p);
  constexpr bool half = std::is_same_v<T, bf16>;
  const Buffer<float> wide = half ? buffer<float>(p.n * p.k) : nullptr;
  const float* x = GRASSLAND_BEST(in_float)(p, wide.get());
  const int64_t ldx = half ? p.k : p.ldx;
  const Division by = divided(p.n, p.m, p.along ? kColumns : kWideColumns);
  each_part(p.n, p.m, by, [&](int64_t row, int64_t rows, int64_t output, int64_t end) {
    const Buffer<float> panels = buffer<float>(kBlock + kWideColumns), sums = buffer<float>(rows * by.outputs);
    Product<T> part = p;
    part.n = rows;
    part.y += row * p.m;
    p.along ? GRASSLAND_BEST(outputs<true>)(part, x + row * ldx, ldx, output, end, panels.get(), sums.get())
            : GRASSLAND_BEST(outputs<false>)(part, x + row * ldx, ldx, output, end, panels.get(), sums.get());
  });
}

// So many terms: the smaller factor is laid out, unless there are so few that all of x stays in the cache.
template <typename T>
void outer_chunk(Outer<T> p, float* room) {
  const int64_t rows = parts(p.m, kStep), columns = parts(p.h, kPair), panels = 2 * columns;
  const int64_t grain = std::max<int64_t>(1, kShare / (p.n * kLanes));
  const bool wide = columns > rows, by_columns = wide && p.n > kFewRows;
  p.laid_out = room;
  torch::stable::parallel_for(0, by_columns ? rows : panels, grain, [&](int64_t begin, int64_t end) {
    by_columns ? GRASSLAND_BEST(pack_rows)(p, begin, end, room) : GRASSLAND_BEST(pack_columns)(p, begin, end, room);
  });
  torch::stable::parallel_for(0, std::max(rows, columns), 1, [&](int64_t begin, int64_t end) {
    const int64_t left = begin * kPair, right = std::min(end * kPair, p.h);
    if (by_columns)
      GRASSLAND_BEST(outer_columns)(p, left, right);
    else if (wide)
      GRASSLAND_BEST(outer_rows)(p, 0, p.m, left, right);
    else
      GRASSLAND_BEST(outer_rows)(p, begin * kStep, std::min(end * kStep, p.m), 0, p.h);
  });
}

template <typename T>
void outer(Outer<T> p) {
  const int64_t terms = p.n, m = p.m, h = p.h;
  const Buffer<float> room = buffer<float>(std::max(rounded(m, kStep), rounded(h, kPair)) * std::min(terms, kChunk));
  const T *g = p.g, *x = p.x;
  for (int64_t base = 0; base < terms; base += kChunk, p.add = true) {
    p.g = g + base * m, p.x = x + base * h;
    p.n = std::min(kChunk, terms - base);
    outer_chunk(p, room.get());
  }
}

template <typename T>
void outer_of(const Tensor& w, const Tensor& g, const Tensor& x, bool add) {
  outer<T>({data<T>(g), data<T>(x), nullptr, data<float>(w), g.size(0), g.size(1), x.size(1), w.stride(0), add});
}

}  // namespace

void few(const Product<float>& p) { few_of(p); }
void few(const Product<bf16>& p) { few_of(p); }

bool tiles_are_best() {
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
  static const bool found = !__builtin_cpu_is("intel") && best_unit() != VectorUnit::plain;
  return found;
#else
  return false;
#endif
}

bool tiled_fits(const Tensor& x, const Tensor& w) {
  if (x.numel() == 0 || x.stride(1) != 1 || (w.stride(1) != 1 && w.stride(0) != 1)) return false;
  if (is_half(x) && multiplies_halves()) return false;
  if (!is_half(x) && tiles_are_best()) return w.numel() >= kSmall;
  if (x.size(0) <= kFew && w.stride(1) == 1) return w.numel() >= kFewLarge;
  return x.size(0) <= kFewRows && w.numel() >= kLarge;
}

void tiled(const Tensor& y, const Tensor& x, const Tensor& w, const Tensor* bias, bool add) {
  is_half(x) ? product(product_of<bf16>(y, x, w, bias, add)) : product(product_of<float>(y, x, w, bias, add));
}

bool tiled_outer_fits(const Tensor& g, const Tensor& x) {
  if (!is_half(g) && tiles_are_best()) return g.size(1) * x.size(1) >= kSmallOuter;
  return g.size(0) <= kFewRows && g.size(1) * x.size(1) >= kLarge;
}

void tiled_outer(const Tensor& w, const Tensor& g, const Tensor& x, bool add) {
  each_share(w, g, x, add, is_half(g) ? outer_of<bf16> : outer_of<float>);
}

}  // namespace grassland
