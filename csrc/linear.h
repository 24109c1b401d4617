// Matrix products, each by the library that is faster for it, and memory that is cheap to touch.
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

inline bool is_half(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

// Whether the processor multiplies bfloat16 (AVX512_BF16, which those with AMX have, too). Elsewhere a product of bfloat16
// is one of float32 that is rounded: a library's is ten to a hundred times slower. Python's is products.multiplies_halves.
bool multiplies_halves();

// x w^T + bias for x (n, k), w (m, k) of any strides.
Tensor linear(const Tensor& x, const Tensor& w, const Tensor* bias = nullptr);

// to = or += from, each float32 or bfloat16, rows of `to` may lie apart.
void put(const Tensor& from, const Tensor& to, bool add = false);

// sum + x w^T, in the memory of sum or in new memory.
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
  std::optional<Tensor> total_, part_;  // part_: what oneDNN has summed, which cannot add to memory that is there
  std::vector<Tensor> halves_;          // bfloat16 products, two at most, that may do without a total
  bool held_ = false;                   // whether total_ holds anything
  bool turned_ = false;                 // whether part_ is (h, m)
};

// total (m, h) = or += left^T right. total: of their dtype, or float32.
void outer_product(const Tensor& total, const Tensor& left, const Tensor& right, bool add);

// Up to so many rows, `skinny` is faster than either library with a large weight: 1.2 to 2 times at 16. With a small one
// its preparations are what takes the time.
constexpr int64_t kSkinny = 64, kLarge = 1 << 16;

// Whether `skinny` takes these.
bool skinny_fits(const Tensor& x, const Tensor& w);

// x w^T + bias for x (n, k), w (m, k), contiguous along k or m.
Tensor skinny(const Tensor& x, const Tensor& w, const Tensor* bias);

// float32 w (m, h) = or += g^T x for contiguous w, g (n, m) and x (n, h), float32 or bfloat16.
void skinny_outer(const Tensor& w, const Tensor& g, const Tensor& x, bool add);

// The same in bfloat16, for x whose length is even, where the processor multiplies pairs of bfloat16 in vectors but not in
// tiles. Libraries take 10 us to prepare a product, and more the more terms a weight has.
bool skinny_bf16_fits(const Tensor& x, const Tensor& w);
Tensor skinny_bf16(const Tensor& x, const Tensor& w, const Tensor* bias);

// w (m, h) = g^T x, of bfloat16 or float32, rows of w may lie apart; or += if w is float32.
bool skinny_bf16_outer_fits(const Tensor& g, const Tensor& x);
void skinny_bf16_outer(const Tensor& w, const Tensor& g, const Tensor& x, bool add);

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
