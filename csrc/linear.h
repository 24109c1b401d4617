// Matrix products, each by what is fastest for it, and memory that is cheap to touch.
#pragma once

#include "common.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace grassland {

inline Tensor flipped(const Tensor& x) {
  Tensor base = x;
  return torch::stable::transpose(base, 0, 1);
}

// While one lives, its thread is the only one that products have: what runs side by side should not be divided further.
class Alone {
 public:
  Alone() : before_(on) { on = true; }
  ~Alone() { on = before_; }
  Alone(const Alone&) = delete;
  static int64_t threads() { return on ? 1 : torch::stable::get_num_threads(); }

 private:
  static inline thread_local bool on = false;
  bool before_;
};

inline bool is_half(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

// Whether no library's product in float32 is faster than tiles, at any size. MKL is on the processors of its maker.
bool tiles_are_best();

// Whether the processor multiplies bfloat16 (AVX512_BF16, which those with AMX have, too). Elsewhere a product of bfloat16
// is one of float32 that is rounded: a library's is ten to a hundred times slower. Python's is products.multiplies_halves.
bool multiplies_halves();

// x w^T + bias for x (n, k), w (m, k) of any strides; in `room`, a contiguous (n, m) of x's dtype, unless it is made elsewhere.
Tensor linear(const Tensor& x, const Tensor& w, const Tensor* bias = nullptr, const Tensor* room = nullptr);

// to = or += from, each float32 or bfloat16, rows of `to` may lie apart.
void put(const Tensor& from, const Tensor& to, bool add = false);

// sum + x w^T, in the memory of sum (contiguous) or in new memory.
Tensor plus_linear(const Tensor& sum, const Tensor& x, const Tensor& w);

// Gradients of a weight: the sum of left^T right over the chunks of a batch, in float32, for contiguous left (n, m) and right
// (n, h), float32 or bfloat16.
class OuterSum {
 public:
  // In memory of its own; of `dtype` in the end, of which bfloat16 is for bfloat16 factors.
  OuterSum(int64_t m, int64_t h, ScalarType dtype = ScalarType::Float) : m_(m), h_(h), dtype_(dtype) {}

  // Into `total`, whose rows may lie apart; on top of what it holds if `add`.
  OuterSum(const Tensor& total, bool add) : m_(total.size(0)), h_(total.size(1)), total_(total), held_(add) {}

  void add(const Tensor& left, const Tensor& right);

  // (m, h); `like` says where it lies if nothing was added.
  Tensor result(const Tensor& like);

 private:
  Tensor& total(const Tensor& like);
  void fold();

  int64_t m_, h_;
  ScalarType dtype_ = ScalarType::Float;
  std::optional<Tensor> total_;
  std::vector<Tensor> halves_;  // bfloat16 products, two at most, that may do without a total
  bool held_ = false;           // whether total_ holds anything
};

// total (m, h) = or += left^T right. total: of their dtype, or float32.
void outer_product(const Tensor& total, const Tensor& left, const Tensor& right, bool add);

// Up to so many rows, tiles are faster than either library with a large weight, on any processor: 1.2 to 2 times at 16. With
// a small one their preparations are what takes the time.
constexpr int64_t kFewRows = 64, kLarge = 1 << 16;

// y = or += x w^T + bias for x (n, k), w (m, k), contiguous along k or m, and contiguous y, if `tiled_fits`: float32, or
// bfloat16 where the processor does not multiply that.
bool tiled_fits(const Tensor& x, const Tensor& w);
void tiled(const Tensor& y, const Tensor& x, const Tensor& w, const Tensor* bias, bool add);

// float32 w (m, h), whose rows may lie apart, = or += g^T x for contiguous g (n, m) and x (n, h), float32 or bfloat16.
bool tiled_outer_fits(const Tensor& g, const Tensor& x);
void tiled_outer(const Tensor& w, const Tensor& g, const Tensor& x, bool add);

// The same in bfloat16, for x whose length is even, where the processor multiplies pairs of bfloat16 in vectors but not in
// tiles (AVX512_BF16 without AMX). w may be bfloat16, which cannot be added to.
bool paired_fits(const Tensor& x, const Tensor& w);
void paired(const Tensor& y, const Tensor& x, const Tensor& w, const Tensor* bias, bool add);
bool paired_outer_fits(const Tensor& g, const Tensor& x);
void paired_outer(const Tensor& w, const Tensor& g, const Tensor& x, bool add);

// Asks for large pages before a fresh tensor is written: a fault for each 4 KiB of a gradient of the experts' size takes
// longer than writing it.
inline void use_large_pages(const Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(x.mutable_data_ptr()) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(x.mutable_data_ptr()) + x.numel() * x.element_size()) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace grassland
