// KromHC on the CPU (arXiv 2601.21579; algebra in kernels/kronecker/eager.py): what its three files share.
//
//   X' = H_res X + h_post (x) y        z = r W vec(X'), r = 1 / max(|vec X'|, eps)
//   h = sigmoid, 2 sigmoid, sigmoid of z + b        u = h_pre X'
//
// kronecker.cpp has the operators, which take blocks of tokens through the functions below: their rows stay in the cache
// between the mixing, the projection and the pre-mix. Rows are (streams, dim), one token after the other; a pointer is to
// the first token of the block.
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

// X' of `count` tokens.
void mix(const Ending<float>& a, const Shape& s, int64_t count, float* out);
void mix(const Ending<bf16>& a, const Shape& s, int64_t count, bf16* out);

// Through the mixing, for the gradient of X'.
void mix_backward(const Ending<float>& a, const EndingGradient<float>& d, const Shape& s, int64_t count, const float* grad);
void mix_backward(const Ending<bf16>& a, const EndingGradient<bf16>& d, const Shape& s, int64_t count, const bf16* grad);
void mix_backward(const Ending<bf16>& a, const EndingGradient<bf16>& d, const Shape& s, int64_t count, const float* grad);

// Coefficients and pre-mix of at most kTokens tokens; `sums` has room for kTokens x padded_columns vectors.
void begin(const float* x, const float* weight, const float* bias, const Beginning<float>& b, const Shape& s, int64_t count,
           float* sums, const Upcoming<float>& next);
void begin(const bf16* x, const float* weight, const float* bias, const Beginning<bf16>& b, const Shape& s, int64_t count,
           float* sums, const Upcoming<bf16>& next);

// The gradients of the logits of at most kTokens tokens; adds to dbias.
void logits_backward(const float* x, const BeginningGradient<float>& g, const Shape& s, int64_t count, LogitGradients& l,
                     float* dbias);
void logits_backward(const bf16* x, const BeginningGradient<bf16>& g, const Shape& s, int64_t count, LogitGradients& l,
                     float* dbias);

// dX = h_pre du + (r g) W + shrink X + what else flows into X, into `out`; dW += (r g) X in the packed layout.
void streams_backward(const float* x, const BeginningGradient<float>& g, const Shape& s, int64_t count,
                      const LogitGradients& l, const float* weight, float* dweight, float* out,
                      const Upcoming<float>& next);
void streams_backward(const bf16* x, const BeginningGradient<bf16>& g, const Shape& s, int64_t count,
                      const LogitGradients& l, const float* weight, float* dweight, bf16* out, const Upcoming<bf16>& next);
void streams_backward(const bf16* x, const BeginningGradient<bf16>& g, const Shape& s, int64_t count,
                      const LogitGradients& l, const float* weight, float* dweight, float* out,
                      const Upcoming<bf16>& next);

// out += x
void add(const float* x, int64_t size, float* out);

}  // namespace grassland::kronecker
