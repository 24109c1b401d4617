// What both products of few rows take.
#pragma once

#include "linear.h"

namespace grassland {

// y = x w^T + bias
template <typename T>
struct Product {
  const T *x, *w, *bias;  // (n, k), rows side by side; (m, k) of either layout; (m) or null
  T* y;                   // (n, m)
  int64_t n, m, k, ldx, ldw;
  bool along;  // w is contiguous along the sum
};

template <typename T>
Product<T> product_of(const Tensor& x, const Tensor& w, const Tensor* bias, const Tensor& y) {
  const bool along = w.stride(1) == 1;
  return {data<T>(x), data<T>(w), bias == nullptr ? nullptr : data<T>(*bias), data<T>(y), x.size(0), w.size(0), x.size(1),
          x.stride(0), along ? w.stride(0) : w.stride(1), along};
}

// With so few rows of x and a w that lies along the sum, the lanes do, too: for a weight of kFewLarge numbers that is as
// fast as a library's product of a vector, and up to two and a half times as fast as its product of two to four. Pairs of
// bfloat16 are faster from three rows on.
constexpr int64_t kFew = 4, kFewHalves = 2, kFewLarge = 1 << 12;

void few(const Product<float>& p);
void few(const Product<bf16>& p);

}  // namespace grassland
