// KromHC on the CPU (arXiv 2601.21579; algebra in kernels/kronecker/eager.py): what rows and operators share.
//
//   X' = H_res X + h_post (x) y        z = r W vec(X'), r = 1 / max(|vec X'|, eps)
//   h = sigmoid, 2 sigmoid, sigmoid of z + b        u = h_pre X'
//
// kronecker.cpp has the operators, which take blocks of tokens through the functions of kronecker_*_rows.h: their rows stay
// in the cache between the mixing, the projection and the pre-mix. Rows are (streams, dim), one token after the other; a
// pointer is to the first token of the block.
#pragma once

#include "common.h"

namespace grassland::kronecker {

// Tokens of a block: they share one reading of the projection's weight.
constexpr int64_t kTokens = 8;
// Columns of the projection that one pass over a row accumulates in registers.
constexpr int64_t kGroup = 5;
constexpr int64_t kMostStreams = 32;

constexpr int64_t stages(int64_t n) { return n == 1 ? 0 : 1 + stages(n / 2); }

struct Shape {
  int64_t tokens, streams, dim, columns, padded_dim, padded_columns;
  float eps;
  int64_t row() const { return streams * dim; }
  // Size of the packed weight, and where it has the columns of stream k from channel c on: kLanes of them a column, one
  // column after the other.
  int64_t packed() const { return streams * padded_dim * padded_columns; }
  int64_t packed(int64_t k, int64_t c) const { return (k * padded_dim + c) * padded_columns; }
};

// X, y and h of a sublayer that ends.
template <typename T>
struct Ending {
  const T *x, *y;
  const float* h;
  Ending at(int64_t token, const Shape& s) const {
    return {x + token * s.row(), y + token * s.dim, h + token * s.columns};
  }
};

template <typename T>
struct EndingGradient {
  T *dx, *dy;
  float* dh;
  EndingGradient at(int64_t token, const Shape& s) const {
    return {dx + token * s.row(), dy + token * s.dim, dh + token * s.columns};
  }
};

// u, h and [z | r] of a sublayer that begins.
template <typename T>
struct Beginning {
  T* u;
  float *h, *saved;
  Beginning at(int64_t token, const Shape& s) const {
    return {u + token * s.dim, h + token * s.columns, saved + token * (s.columns + 1)};
  }
};

// What its backward gets; dx, or nullptr, is what else flows into X.
template <typename T>
struct BeginningGradient {
  const T *du, *dx;
  const float *dh, *h, *saved;
  BeginningGradient at(int64_t token, const Shape& s) const {
    return {du + token * s.dim, dx == nullptr ? nullptr : dx + token * s.row(), dh + token * s.columns,
            h + token * s.columns, saved + token * (s.columns + 1)};
  }
};

// Gradients of the logits of a block: r g, column by column with a token a lane, and the factor of X in dX,
// -r^2 <g, z>, 0 where the norm is clamped.
struct LogitGradients {
  std::vector<float> scaled;
  float shrink[kTokens];
  explicit LogitGradients(const Shape& s) : scaled(s.columns * kTokens) {}
};

// Rows that the next block reads: they are fetched while this one is computed.
template <typename T>
struct Upcoming {
  const T* x;
  int64_t tokens;
};

}  // namespace grassland::kronecker
