// What the products of tiles.cpp (float32) and pairs.cpp (bfloat16) share.
#pragma once

#include "linear.h"

#include <limits>
#include <memory>
#include <new>

namespace grassland {

// y = x w^T + bias, or += x w^T
template <typename T>
struct Product {
  const T *x, *w, *bias;  // (n, k), rows side by side; (m, k) of either layout; (m) or null
  T* y;                   // (n, m), rows side by side
  int64_t n, m, k, ldx, ldw;
  bool along;  // w is contiguous along the sum
  bool add;
};

template <typename T>
Product<T> product_of(const Tensor& y, const Tensor& x, const Tensor& w, const Tensor* bias, bool add) {
  const bool along = w.stride(1) == 1;
  return {data<T>(x), data<T>(w), bias == nullptr ? nullptr : data<T>(*bias), data<T>(y), x.size(0), w.size(0), x.size(1),
          x.stride(0), along ? w.stride(0) : w.stride(1), along, add};
}

inline int64_t parts(int64_t x, int64_t step) { return (x + step - 1) / step; }
inline int64_t rounded(int64_t x, int64_t step) { return parts(x, step) * step; }

struct Free {
  void operator()(void* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

template <typename T>
Buffer<T> buffer(int64_t size) {
  return Buffer<T>(static_cast<T*>(::operator new[](size * sizeof(T), std::align_val_t(64))));
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

// For so many rows of so many numbers, to be asked for in `looks` times.
template <typename T>
GRASSLAND_INLINE Ahead ahead_of(const T* first, int64_t ld, int64_t rows, int64_t width, int64_t looks) {
  const int64_t size = sizeof(T), lines = parts(width * size, 64);
  return {reinterpret_cast<const char*>(first), ld * size, lines, rows, parts(rows * lines, looks)};
}

// For the block of `outputs` by `terms` of w that begins at (output, term), or nothing where that is beyond it.
template <typename T>
GRASSLAND_INLINE Ahead look_ahead(const Product<T>& p, int64_t output, int64_t term, int64_t outputs, int64_t terms,
                                  int64_t looks) {
  outputs = output < p.m ? std::min(outputs, p.m - output) : 0;
  terms = std::min(terms, p.k - term);
  return p.along ? ahead_of(p.w + output * p.ldw + term, p.ldw, outputs, terms, looks)
                 : ahead_of(p.w + term * p.ldw + output, p.ldw, outputs > 0 ? terms : 0, outputs, looks);
}

// A product among threads: so many parts of the rows of x by blocks of so many outputs. A block of w is laid out anew for
// each part.
struct Division {
  int64_t rows, outputs;
};

constexpr int64_t kColumns = 64;    // outputs of a tile in the widest vectors
constexpr int64_t kLayOut = 12;     // rows of x whose multiplication takes as long as laying out a block of w
constexpr int64_t kMostRows = 512;  // what is summed of more does not stay in the second cache

// The division that keeps no thread for long; blocks of about the same size, at most `most` outputs.
inline Division divided(int64_t n, int64_t m, int64_t most) {
  const int64_t threads = Alone::threads(), columns = parts(m, kColumns), least = parts(n, kMostRows);
  Division found{};
  for (int64_t rows = least, cost = std::numeric_limits<int64_t>::max(); rows < least + threads; ++rows) {
    const int64_t blocks = parts(columns, std::min(most / kColumns, parts(columns * rows, threads)));
    const int64_t width = parts(columns, blocks);
    const int64_t each = parts(rows * blocks, threads) * width * (parts(n, rows) + kLayOut);
    if (each < cost) cost = each, found = {rows, width * kColumns};
  }
  return found;
}

// run(first row, rows, first output, end) for each part of a product, on all threads.
template <typename F>
void each_part(int64_t n, int64_t m, const Division& by, const F& run) {
  const int64_t blocks = parts(m, by.outputs);
  torch::stable::parallel_for(0, by.rows * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / blocks * n / by.rows, last = (i / blocks + 1) * n / by.rows, output = i % blocks * by.outputs;
      run(row, last - row, output, std::min(output + by.outputs, m));
    }
  });
}

// Threads share the terms of a gradient, kTermShare or more each, where the sums, which they tell each other, are small and
// half of what they would lay out for each other: cores without a common cache take four times as long to pass a line on.
constexpr int64_t kTermShare = 128, kMostShared = 1 << 17;

inline int64_t term_shares(int64_t n, int64_t m, int64_t h) {
  if (m * h > kMostShared || n < 2 * std::max(m, h)) return 1;
  return std::max<int64_t>(1, std::min(Alone::threads(), n / kTermShare));
}

// w = or += the sum of run(w, g, x, add) over shares of the terms of g (n, m) and x (n, h), each in one thread.
template <typename F>
void each_share(const Tensor& w, const Tensor& g, const Tensor& x, bool add, const F& run) {
  const int64_t n = g.size(0), m = g.size(1), h = x.size(1), shares = term_shares(n, m, h);
  if (shares == 1) return run(w, g, x, add);
  const bool direct = w.scalar_type() == ScalarType::Float;
  const Tensor sums = empty(w, {shares * m, h}, ScalarType::Float);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    const Alone alone;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * n / shares, last = (i + 1) * n / shares;
      const bool here = direct && i == 0;
      run(here ? w : rows(sums, i * m, (i + 1) * m), rows(g, first, last), rows(x, first, last), here && add);
    }
  });
  const Tensor total = direct ? w : rows(sums, 0, m);
  for (int64_t i = 1; i < shares; ++i) put(rows(sums, i * m, (i + 1) * m), total, true);
  if (!direct) put(total, w);
}

// Numbers of a weight, and of a gradient, from which on tiles are faster than MKL's and oneDNN's products of any number of
// rows: preparing those takes 2 to 17 us.
constexpr int64_t kSmall = 1 << 10, kSmallOuter = 1 << 12;

constexpr int64_t kShare = 1 << 15;  // numbers to be laid out that are worth a thread

// With few rows of x and a w that lies along the sum, the lanes do, too, and w is read once, as it lies: for a weight of
// kFewLarge numbers and kFew rows that is as fast as a library's product of a vector, and up to two and a half times as fast
// as its product of two to four, on any processor. Pairs of bfloat16 are faster from three rows on.
constexpr int64_t kFew = 4, kFewHalves = 2, kFewLarge = 1 << 12;

void few(const Product<float>& p);
void few(const Product<bf16>& p);

}  // namespace grassland
