// Products of few rows with a large weight, y = x w^T + bias, where reading the weight is the work, and the weight's gradient,
// where writing it is.
//
// w is read once, a block at a time, which is laid out in panels (term, lane) of sixteen outputs in the cache, while the
// memory is asked for the next: it comes in pieces too short for it to foresee. A tile has a few rows of x, whose numbers
// are broadcast, and a few panels.
#include "skinny.h"
#include "vec.h"

#include <memory>
#include <new>

namespace grassland {
namespace {

// A block of w has kTerms terms of kOutputs outputs if it is contiguous along the sum, else kWideTerms of kWideOutputs.
constexpr int64_t kOutputs = 64, kTerms = 128, kWideOutputs = 384, kWideTerms = 64;
constexpr int64_t kBlock = std::max(kOutputs * kTerms, kWideOutputs * kWideTerms);
constexpr int64_t kTile = 6;   // rows of x
constexpr int64_t kLook = 8;   // terms between two looks ahead
constexpr int64_t kStep = 24;  // rows of a gradient: those of all tiles divide it

struct Free {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer buffer(int64_t size) {
  return Buffer(static_cast<float*>(::operator new[](size * sizeof(float), std::align_val_t(64))));
}

int64_t rounded(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// w (m, h) = or += g^T x for g (n, m), x in panels (panel, n, lane).
template <typename T>
struct Outer {
  const T *g, *x;
  const float* panels;
  float* w;
  int64_t n, m, h;
  bool add;
};

#define GRASSLAND_SOURCE "skinny_rows.h"
#include "units.h"

template <typename T>
void few_of(const Product<T>& p) {
  // Numbers of w that are worth a thread.
  constexpr int64_t kShare = 1 << 15, kTall = 8;
  const int64_t grain = kShare / (kTall * p.k) + 1;
  torch::stable::parallel_for(0, rounded(p.m, kTall) / kTall, grain, [&](int64_t begin, int64_t end) {
    GRASSLAND_BEST(few_rows)(p, begin * kTall, std::min(end * kTall, p.m));
  });
}

template <typename T>
void outer(const Tensor& w, const Tensor& g, const Tensor& x, bool add) {
  Outer<T> p{data<T>(g), data<T>(x), nullptr, data<float>(w), g.size(0), g.size(1), x.size(1), add};
  const int64_t count = rounded(p.h, 2 * kLanes) / kLanes;
  const Buffer panels = buffer(count * kLanes * p.n);
  torch::stable::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    GRASSLAND_BEST(pack_columns)(p, begin, end, panels.get());
  });
  p.panels = panels.get();
  torch::stable::parallel_for(0, rounded(p.m, kStep) / kStep, 2, [&](int64_t begin, int64_t end) {
    GRASSLAND_BEST(outer_range)(p, begin * kStep, std::min(end * kStep, p.m));
  });
}

template <typename T>
Tensor skinny_of(const Tensor& x, const Tensor& w, const Tensor* bias) {
  const Tensor y = empty(x, {x.size(0), w.size(0)}, kDtype<T>);
  const Product<T> p = product_of<T>(x, w, bias, y);
  if (p.n <= kFew && p.along) {
    few_of(p);
    return y;
  }
  const Buffer wide = is_half(x) ? buffer(p.n * p.k) : nullptr;
  const float* rows = GRASSLAND_BEST(in_float)(p, wide.get());
  const int64_t ld = is_half(x) ? p.k : p.ldx, threads = torch::stable::get_num_threads();
  const int64_t share = rounded((p.m + threads - 1) / threads, kOutputs);
  const int64_t most = p.along ? kOutputs : std::min(share, kWideOutputs);
  torch::stable::parallel_for(0, rounded(p.m, most) / most, 1, [&](int64_t first, int64_t last) {
    const Buffer panels = buffer(kBlock), sums = buffer(p.n * most);
    for (int64_t output = first * most; output < std::min(last * most, p.m); output += most) {
      const int64_t end = std::min(output + most, p.m);
      p.along ? GRASSLAND_BEST(outputs<true>)(p, rows, ld, output, end, panels.get(), sums.get())
              : GRASSLAND_BEST(outputs<false>)(p, rows, ld, output, end, panels.get(), sums.get());
    }
  });
  return y;
}

}  // namespace

void few(const Product<float>& p) { few_of(p); }
void few(const Product<bf16>& p) { few_of(p); }

bool skinny_fits(const Tensor& x, const Tensor& w) {
  if (is_half(x) && multiplies_halves()) return false;
  if (x.numel() == 0 || x.stride(1) != 1) return false;
  if (x.size(0) <= kFew && w.stride(1) == 1) return w.numel() >= kFewLarge;
  return x.size(0) <= kSkinny && w.numel() >= kLarge && (w.stride(1) == 1 || w.stride(0) == 1);
}

Tensor skinny(const Tensor& x, const Tensor& w, const Tensor* bias) {
  return is_half(x) ? skinny_of<bf16>(x, w, bias) : skinny_of<float>(x, w, bias);
}

void skinny_outer(const Tensor& w, const Tensor& g, const Tensor& x, bool add) {
  (is_half(g) ? outer<bf16> : outer<float>)(w, g, x, add);
}

}  // namespace grassland
