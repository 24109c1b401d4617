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

// The lines of the next block of w, asked for while this one is multiplied: it comes in pieces too short for the memory to
// foresee.
struct Ahead {
  const char* row;
  int64_t stride, lines, rows;  // bytes from one row to the next, lines of each
  int64_t each;                 // lines to ask for at a time
  int64_t line = 0;

  __attribute__((always_inline)) void ask() {
    for (int64_t i = 0; i < each && rows > 0; ++i) {
      __builtin_prefetch(row + line * 64, 0, 2);
      if (++line < lines) continue;
      line = 0;
      row += stride;
      --rows;
    }
  }
};

// For the block of `outputs` by `terms` that begins at (output, term), or nothing where that is beyond w, to be asked for
// in `looks` times.
template <typename T>
GRASSLAND_INLINE Ahead look_ahead(const Product<T>& p, int64_t output, int64_t term, int64_t outputs, int64_t terms,
                                  int64_t looks) {
  outputs = std::min(outputs, p.m - output);
  terms = std::min(terms, p.k - term);
  const int64_t rows = output >= p.m ? 0 : p.along ? outputs : terms;
  const int64_t size = sizeof(T), lines = ((p.along ? terms : outputs) * size + 63) / 64;
  const T* first = p.w + (p.along ? output * p.ldw + term : term * p.ldw + output);
  return {reinterpret_cast<const char*>(first), p.ldw * size, lines, rows, (rows * lines + looks - 1) / looks};
}

// With so few rows of x and a w that lies along the sum, the lanes do, too: for a weight of kFewLarge numbers that is as
// fast as a library's product of a vector, and up to two and a half times as fast as its product of two to four. Pairs of
// bfloat16 are faster from three rows on.
constexpr int64_t kFew = 4, kFewHalves = 2, kFewLarge = 1 << 12;

void few(const Product<float>& p);
void few(const Product<bf16>& p);

}  // namespace grassland
