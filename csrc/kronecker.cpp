// KromHC on the CPU (arXiv 2601.21579; algebra in kernels/kronecker/eager.py).
//
//   X' = H_res X + h_post (x) y        z = r W vec(X'), r = 1 / max(|vec X'|, eps)
//   h = sigmoid, 2 sigmoid, sigmoid of z + b        u = h_pre X'
//
// A few tokens at a time, whose rows stay in the cache between the mixing, the projection and the pre-mix. H_res is a
// butterfly on registers: stage by stage e = q (x_0 - x_1), x_0 -= e, x_1 += e.
#include "common.h"
#include "vec.h"

namespace grassland {
namespace {

// Tokens that share one reading of the projection's weight, forward and backward.
constexpr int64_t kForward = 4;
constexpr int64_t kBackward = 8;
// Columns of the projection that one pass over the row accumulates in registers.
constexpr int64_t kGroup = 5;
// Blocks of the weight gradient: at most this many, each of at least this many tokens. Independent of the threads.
constexpr int64_t kMostBlocks = 64;
constexpr int64_t kLeastTokens = 128;

constexpr int64_t stages(int64_t n) { return n == 1 ? 0 : 1 + stages(n / 2); }

struct Shape {
  int64_t tokens, streams, dim, columns, padded_dim, padded_columns;
  float eps;
  int64_t row() const { return streams * padded_dim; }
  // Rows of scratch start in different sets of the cache, also where the row is a multiple of a page.
  int64_t scratch() const { return row() + kLanes; }
  // Where the packed weight has the columns of stream k from channel c on: kLanes of them a column, one after the other.
  int64_t packed(int64_t k, int64_t c) const { return (k * padded_dim + c) * padded_columns; }
};

// What the three forwards and backwards read and write; which of them, says the function.
template <typename T>
struct Rows {
  const T *x, *y, *du, *dfollowing;
  const float *h, *weight, *bias, *after, *saved, *dafter;
  T *out, *u, *dx, *dy;
  float *after_out, *saved_out, *dh, *dweight, *dbias;
};

template <int N>
GRASSLAND_INLINE void mix(Vec* x, const float* q) {
  int64_t stage = 0;
  for (int half = N / 2; half >= 1; half /= 2, ++stage)
    for (int s = 0; s < N; ++s)
      if (!(s & half)) {
        const Vec e = q[stage] * (x[s] - x[s + half]);
        x[s] -= e;
        x[s + half] += e;
      }
}

// X' of one token; `out` has rows of `stride`.
template <int N, typename T, typename O>
GRASSLAND_INLINE void post_token(const T* x, const T* y, const float* h, int64_t dim, int64_t stride, O* out) {
  for_each_vector(dim, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    Vec v[N];
    for (int s = 0; s < N; ++s) v[s] = load(x + s * dim + c, live);
    mix<N>(v, h + 2 * N);
    const Vec branch = load(y + c, live);
    for (int s = 0; s < N; ++s) {
      v[s] += h[N + s] * branch;
      // The scratch row of the backward holds what the forward has stored, rounded.
      if (std::is_same_v<T, O>)
        store(v[s], out + s * stride + c, live);
      else
        store_rounded<T>(v[s], reinterpret_cast<float*>(out) + s * stride + c);
    }
  });
}

template <typename T>
GRASSLAND_INLINE float square_norm(const T* x, int64_t size) {
  Vec sum = {};
  for_each_vector(size, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    const Vec v = load(x + c, live);
    sum += v * v;
  });
  return total(sum);
}

// z without r: kGroup columns of the projection for kForward tokens.
template <int N, typename T>
GRASSLAND_INLINE void project_group(const T* const* x, const float* weight, const Shape& s, float* products) {
  Vec sum[kForward][kGroup] = {};
  for (int64_t k = 0; k < N; ++k) {
    const T* row[kForward];
    for (int64_t t = 0; t < kForward; ++t) row[t] = x[t] + k * s.dim;
    for_each_vector(s.dim, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
      Vec v[kForward];
      for (int64_t t = 0; t < kForward; ++t) v[t] = load(row[t] + c, live);
      for (int64_t j = 0; j < kGroup; ++j) {
        const Vec column = load_full(weight + s.packed(k, c) + j * kLanes);
        for (int64_t t = 0; t < kForward; ++t) sum[t][j] += column * v[t];
      }
    });
  }
  for (int64_t t = 0; t < kForward; ++t)
    for (int64_t j = 0; j < kGroup; ++j) products[t * s.padded_columns + j] = total(sum[t][j]);
}

// Columns of the coefficients: sigmoid, twice sigmoid for the n of h_post.
GRASSLAND_INLINE float top(int64_t column, int64_t n) { return column >= n && column < 2 * n ? 2.0f : 1.0f; }

// Coefficients and pre-mix of tokens begin … end, at most kForward, from streams `x`.
template <int N, typename T>
GRASSLAND_INLINE void pre_block(const Rows<T>& a, const Shape& s, const T* x, int64_t begin, int64_t end, float* products) {
  const T* row[kForward];
  for (int64_t t = 0; t < kForward; ++t) row[t] = x + std::min(begin + t, end - 1) * N * s.dim;
  for (int64_t j = 0; j < s.padded_columns; j += kGroup) project_group<N>(row, a.weight + j * kLanes, s, products + j);
  for (int64_t t = 0; t < end - begin; ++t) {
    const float r = 1.0f / std::max(std::sqrt(square_norm(row[t], N * s.dim)), s.eps);
    float *h = a.after_out + (begin + t) * s.columns, *saved = a.saved_out + (begin + t) * (s.columns + 1);
    for (int64_t j = 0; j < s.columns; ++j) {
      saved[j] = r * products[t * s.padded_columns + j];
      h[j] = top(j, N) * sigmoid(saved[j] + a.bias[j]);
    }
    saved[s.columns] = r;
    T* u = a.u + (begin + t) * s.dim;
    for_each_vector(s.dim, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
      Vec sum = {};
      for (int k = 0; k < N; ++k) sum += h[k] * load(row[t] + k * s.dim + c, live);
      store(sum, u + c, live);
    });
  }
}

template <int N, typename T>
GRASSLAND_INLINE void forward_body(const Rows<T>& a, const Shape& s, int64_t begin, int64_t end, bool post, bool pre) {
  std::vector<float> products(kForward * s.padded_columns);
  for (int64_t base = begin; base < end; base += kForward) {
    const int64_t stop = std::min(base + kForward, end);
    for (int64_t t = base; t < stop && post; ++t)
      post_token<N>(a.x + t * N * s.dim, a.y + t * s.dim, a.h + t * s.columns, s.dim, s.dim, a.out + t * N * s.dim);
    if (pre) pre_block<N>(a, s, post ? a.out : a.x, base, stop, products.data());
  }
}

// Through the mixing of one token, for the gradient g of X': dx = H_res g, dy = h_post g, dh_post = <g, y> and, with x as it
// enters and g as it leaves stage k, dq_k = -sum (g_0 - g_1)(x_0 - x_1).
template <int N, typename T, typename G>
GRASSLAND_INLINE void post_backward_token(const Rows<T>& a, const Shape& s, int64_t token, const G* grad, int64_t stride) {
  constexpr int64_t kStages = stages(N);
  const T *x = a.x + token * N * s.dim, *y = a.y + token * s.dim;
  const float *h = a.h + token * s.columns, *q = h + 2 * N;
  Vec along_y[N] = {}, along_x[kStages] = {};
  for_each_vector(s.dim, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    Vec v[N], g[N], entering[kStages][N / 2], dy = {};
    const Vec branch = load(y + c, live);
    for (int k = 0; k < N; ++k) {
      v[k] = load(x + k * s.dim + c, live);
      g[k] = load(grad + k * stride + c, live);
      dy += h[N + k] * g[k];
      along_y[k] += g[k] * branch;
    }
    int64_t stage = 0;
    for (int half = N / 2; half >= 1; half /= 2, ++stage) {
      int pair = 0;
      for (int k = 0; k < N; ++k)
        if (!(k & half)) {
          const Vec difference = v[k] - v[k + half], e = q[stage] * difference;
          entering[stage][pair++] = difference;
          v[k] -= e;
          v[k + half] += e;
        }
    }
    for (int half = 1; half <= N / 2; half *= 2) {
      --stage;
      int pair = 0;
      for (int k = 0; k < N; ++k)
        if (!(k & half)) {
          const Vec difference = g[k] - g[k + half], e = q[stage] * difference;
          along_x[stage] -= difference * entering[stage][pair++];
          g[k] -= e;
          g[k + half] += e;
        }
    }
    for (int k = 0; k < N; ++k) store(g[k], a.dx + (token * N + k) * s.dim + c, live);
    store(dy, a.dy + token * s.dim + c, live);
  });
  float* dh = a.dh + token * s.columns;
  for (int k = 0; k < N; ++k) {
    dh[k] = 0;
    dh[N + k] = total(along_y[k]);
  }
  for (int64_t k = 0; k < kStages; ++k) dh[2 * N + k] = total(along_x[k]);
}

// The gradient g of the logits of one token, times r into every kBackward-th of `scaled`, and the factor of X in dX:
// -r^2 <g, z>, 0 where the norm is clamped. `x` is the padded row of X.
template <int N, typename T>
GRASSLAND_INLINE float logits_backward(const Rows<T>& a, const Shape& s, int64_t token, const float* x, float* scaled) {
  Vec along[N] = {};
  const T* du = a.du + token * s.dim;
  for_each_vector(s.dim, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    const Vec g = load(du + c, live);
    for (int k = 0; k < N; ++k) along[k] += g * load_full(x + k * s.padded_dim + c);
  });
  const float *h = a.after + token * s.columns, *saved = a.saved + token * (s.columns + 1);
  const float* dh = a.dafter + token * s.columns;
  const float r = saved[s.columns];
  float inner = 0;
  for (int64_t j = 0; j < s.columns; ++j) {
    const float direct = j < N ? total(along[std::min<int64_t>(j, N - 1)]) : 0.0f;
    const float g = (dh[j] + direct) * h[j] * (1.0f - h[j] / top(j, N));
    a.dbias[j] += g;
    inner += g * saved[j];
    scaled[j * kBackward] = r * g;
  }
  return r < 1.0f / s.eps ? -r * r * inner : 0.0f;
}

// dX = h_pre du + (r g) W + shrink X + what else flows into X, for a block of tokens; dW += (r g) X, both in one pass
// over W.
template <int N, typename T, typename O>
GRASSLAND_INLINE void streams_backward(const Rows<T>& a, const Shape& s, int64_t begin, int64_t end, const float* x,
                                       const float* scaled, const float* shrink, O* out, int64_t stride) {
  for (int64_t k = 0; k < N; ++k)
    for_each_vector(s.dim, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
      const float* weight = a.weight + s.packed(k, c);
      float* dweight = a.dweight + s.packed(k, c);
      Vec v[kBackward], d[kBackward];
      for (int64_t t = 0; t < kBackward; ++t) {
        v[t] = load_full(x + t * s.scratch() + k * s.padded_dim + c);
        d[t] = shrink[t] * v[t];
      }
      for (int64_t j = 0; j < s.columns; ++j) {
        const Vec w = load_full(weight + j * kLanes);
        Vec dw = load_full(dweight + j * kLanes);
        for (int64_t t = 0; t < kBackward; ++t) {
          const float g = scaled[j * kBackward + t];
          d[t] += g * w;
          dw += g * v[t];
        }
        store_full(dw, dweight + j * kLanes);
      }
      // A bound that is not a constant would keep d out of the registers.
      for (int64_t t = 0; t < kBackward; ++t) {
        if (begin + t >= end) continue;
        const int64_t token = begin + t;
        d[t] += a.after[token * s.columns + k] * load(a.du + token * s.dim + c, live);
        if (a.dfollowing != nullptr) d[t] += load(a.dfollowing + (token * N + k) * s.dim + c, live);
        store(d[t], out + (t * N + k) * stride + c, live);
      }
    });
}

// Tokens begin … end of the backward of pre, or of post and pre together: then X' is computed again.
template <int N, typename T>
GRASSLAND_INLINE void backward_body(const Rows<T>& a, const Shape& s, int64_t begin, int64_t end, bool post) {
  std::vector<float> following(kBackward * s.scratch()), grad(post ? kBackward * s.row() : 0);
  std::vector<float> scaled(s.columns * kBackward);
  for (int64_t base = begin; base < end; base += kBackward) {
    const int64_t stop = std::min(base + kBackward, end);
    float shrink[kBackward] = {};
    std::fill(scaled.begin(), scaled.end(), 0.0f);
    for (int64_t t = 0; t < stop - base; ++t) {
      const T* x = a.x + (base + t) * N * s.dim;
      float* row = following.data() + t * s.scratch();
      if (post)
        post_token<N>(x, a.y + (base + t) * s.dim, a.h + (base + t) * s.columns, s.dim, s.padded_dim, row);
      else
        for (int64_t k = 0; k < N; ++k)
          for_each_vector(s.dim, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
            store_full(load(x + k * s.dim + c, live), row + k * s.padded_dim + c);
          });
      shrink[t] = logits_backward<N>(a, s, base + t, row, scaled.data() + t);
    }
    if (!post) {
      streams_backward<N>(a, s, base, stop, following.data(), scaled.data(), shrink, a.dx + base * N * s.dim, s.dim);
      continue;
    }
    streams_backward<N>(a, s, base, stop, following.data(), scaled.data(), shrink, grad.data(), s.padded_dim);
    for (int64_t t = base; t < stop; ++t)
      post_backward_token<N>(a, s, t, grad.data() + (t - base) * s.row(), s.padded_dim);
  }
}

#define GRASSLAND_BY_STREAMS(n, call) \
  switch (n) {                        \
    case 2: {                         \
      constexpr int N = 2;            \
      call;                           \
      break;                          \
    }                                 \
    case 4: {                         \
      constexpr int N = 4;            \
      call;                           \
      break;                          \
    }                                 \
    default: {                        \
      constexpr int N = 8;            \
      call;                           \
    }                                 \
  }

GRASSLAND_MULTIARCH void forward_rows(const Rows<float>& a, const Shape& s, int64_t begin, int64_t end, bool post, bool pre) {
  GRASSLAND_BY_STREAMS(s.streams, (forward_body<N>(a, s, begin, end, post, pre)))
}

GRASSLAND_MULTIARCH void forward_rows(const Rows<bf16>& a, const Shape& s, int64_t begin, int64_t end, bool post, bool pre) {
  GRASSLAND_BY_STREAMS(s.streams, (forward_body<N>(a, s, begin, end, post, pre)))
}

GRASSLAND_MULTIARCH void backward_rows(const Rows<float>& a, const Shape& s, int64_t begin, int64_t end, bool post) {
  GRASSLAND_BY_STREAMS(s.streams, (backward_body<N>(a, s, begin, end, post)))
}

GRASSLAND_MULTIARCH void backward_rows(const Rows<bf16>& a, const Shape& s, int64_t begin, int64_t end, bool post) {
  GRASSLAND_BY_STREAMS(s.streams, (backward_body<N>(a, s, begin, end, post)))
}

template <int N, typename T>
GRASSLAND_INLINE void post_backward_body(const Rows<T>& a, const Shape& s, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) post_backward_token<N>(a, s, t, a.dfollowing + t * N * s.dim, s.dim);
}

GRASSLAND_MULTIARCH void post_backward_rows(const Rows<float>& a, const Shape& s, int64_t begin, int64_t end) {
  GRASSLAND_BY_STREAMS(s.streams, (post_backward_body<N>(a, s, begin, end)))
}

GRASSLAND_MULTIARCH void post_backward_rows(const Rows<bf16>& a, const Shape& s, int64_t begin, int64_t end) {
  GRASSLAND_BY_STREAMS(s.streams, (post_backward_body<N>(a, s, begin, end)))
}

GRASSLAND_MULTIARCH void add_blocks(const float* parts, int64_t count, int64_t stride, int64_t size, float* out) {
  std::memcpy(out, parts, size * sizeof(float));
  for (int64_t p = 1; p < count; ++p)
    for (int64_t i = 0; i < size; ++i) out[i] += parts[p * stride + i];
}

Shape shape_of(const Tensor& x, double eps) {
  Shape s{x.size(0), x.size(1), x.size(2), 0, 0, 0, static_cast<float>(eps)};
  s.columns = 2 * s.streams + stages(s.streams);
  s.padded_dim = (s.dim + kLanes - 1) / kLanes * kLanes;
  s.padded_columns = (s.columns + kGroup - 1) / kGroup * kGroup;
  return s;
}

// The weight (columns, n C) as the kernels read it, with zeros up to whole groups of columns and whole vectors.
Tensor pack(const Tensor& weight, const Shape& s) {
  Tensor packed = zeros(weight, {s.row(), s.padded_columns}, ScalarType::Float);
  for (int64_t j = 0; j < s.columns; ++j)
    for (int64_t k = 0; k < s.streams; ++k)
      for (int64_t c = 0; c < s.dim; c += kLanes)
        std::memcpy(data<float>(packed) + s.packed(k, c) + j * kLanes,
                    data<float>(weight) + (j * s.streams + k) * s.dim + c,
                    std::min(kLanes, s.dim - c) * sizeof(float));
  return packed;
}

void unpack(const float* packed, const Shape& s, float* weight) {
  for (int64_t j = 0; j < s.columns; ++j)
    for (int64_t k = 0; k < s.streams; ++k)
      for (int64_t c = 0; c < s.dim; c += kLanes)
        std::memcpy(weight + (j * s.streams + k) * s.dim + c, packed + s.packed(k, c) + j * kLanes,
                    std::min(kLanes, s.dim - c) * sizeof(float));
}

template <typename T>
Rows<T> rows_of(const Tensor& x) {
  Rows<T> a{};
  a.x = data<T>(x);
  return a;
}

// Blocks of tokens whose weight gradients are summed apart, then together, in an order that no thread count changes.
struct Blocks {
  int64_t size, count;
  explicit Blocks(int64_t tokens) {
    const int64_t even = (tokens + kMostBlocks - 1) / kMostBlocks;
    size = (std::max(kLeastTokens, even) + kBackward - 1) / kBackward * kBackward;
    count = (tokens + size - 1) / size;
  }
};

struct Projected {
  Tensor u, h, saved;
  Projected(const Tensor& x, const Shape& s, ScalarType dtype)
      : u(empty(x, {s.tokens, s.dim}, dtype)),
        h(empty(x, {s.tokens, s.columns}, ScalarType::Float)),
        saved(empty(x, {s.tokens, s.columns + 1}, ScalarType::Float)) {}
};

template <typename T>
Projected forward(Rows<T> a, const Tensor& x, const Tensor& weight, const Tensor& bias, const Shape& s, bool post) {
  Projected p(x, s, kDtype<T>);
  const Tensor packed = pack(weight, s);
  a.weight = data<float>(packed);
  a.bias = data<float>(bias);
  a.u = data<T>(p.u);
  a.after_out = data<float>(p.h);
  a.saved_out = data<float>(p.saved);
  torch::stable::parallel_for(0, s.tokens, 4 * kForward,
                              [&](int64_t begin, int64_t end) { forward_rows(a, s, begin, end, post, true); });
  return p;
}

// (dweight, dbias); the rest of the outputs is in `a`.
template <typename T>
std::tuple<Tensor, Tensor> backward(const Rows<T>& a, const Tensor& weight, const Shape& s, bool post) {
  Tensor dweight = zeros(weight, {s.columns, s.streams * s.dim}, ScalarType::Float);
  Tensor dbias = zeros(weight, {s.columns}, ScalarType::Float);
  if (s.tokens == 0) return {dweight, dbias};
  const Tensor packed = pack(weight, s);
  const Blocks blocks(s.tokens);
  const int64_t matrix = s.padded_columns * s.row();
  const Tensor parts = empty(weight, {blocks.count, matrix}, ScalarType::Float);
  const Tensor bias_parts = zeros(weight, {blocks.count, s.columns}, ScalarType::Float);
  torch::stable::parallel_for(0, blocks.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      Rows<T> mine = a;
      mine.weight = data<float>(packed);
      mine.dweight = data<float>(parts) + b * matrix;
      mine.dbias = data<float>(bias_parts) + b * s.columns;
      std::memset(mine.dweight, 0, matrix * sizeof(float));
      backward_rows(mine, s, b * blocks.size, std::min((b + 1) * blocks.size, s.tokens), post);
    }
  });
  const Tensor sum = empty(weight, {matrix}, ScalarType::Float);
  torch::stable::parallel_for(0, matrix, 1 << 12, [&](int64_t begin, int64_t end) {
    add_blocks(data<float>(parts) + begin, blocks.count, matrix, end - begin, data<float>(sum) + begin);
  });
  unpack(data<float>(sum), s, data<float>(dweight));
  add_blocks(data<float>(bias_parts), blocks.count, s.columns, s.columns, data<float>(dbias));
  return {dweight, dbias};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> pre(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  const Shape s = shape_of(x, eps);
  const Projected p = forward(rows_of<T>(x), x, weight, bias, s, false);
  return {p.u, p.h, p.saved};
}

template <typename T>
Tensor post(const Tensor& x, const Tensor& y, const Tensor& h) {
  const Shape s = shape_of(x, 0);
  Tensor out = empty(x, {s.tokens, s.streams, s.dim}, kDtype<T>);
  Rows<T> a = rows_of<T>(x);
  a.y = data<T>(y);
  a.h = data<float>(h);
  a.out = data<T>(out);
  torch::stable::parallel_for(0, s.tokens, 4 * kForward,
                              [&](int64_t begin, int64_t end) { forward_rows(a, s, begin, end, true, false); });
  return out;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> step(const Tensor& x, const Tensor& y, const Tensor& h, const Tensor& weight,
                                                const Tensor& bias, double eps) {
  const Shape s = shape_of(x, eps);
  Tensor out = empty(x, {s.tokens, s.streams, s.dim}, kDtype<T>);
  Rows<T> a = rows_of<T>(x);
  a.y = data<T>(y);
  a.h = data<float>(h);
  a.out = data<T>(out);
  const Projected p = forward(a, x, weight, bias, s, true);
  return {out, p.u, p.h, p.saved};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> pre_backward(const Tensor& du, const Tensor& dh, const Tensor& x, const Tensor& weight,
                                                const Tensor& h, const Tensor& saved, double eps) {
  const Shape s = shape_of(x, eps);
  Tensor dx = empty(x, {s.tokens, s.streams, s.dim}, kDtype<T>);
  Rows<T> a = rows_of<T>(x);
  a.du = data<T>(du);
  a.dafter = data<float>(dh);
  a.after = data<float>(h);
  a.saved = data<float>(saved);
  a.dx = data<T>(dx);
  const auto [dweight, dbias] = backward(a, weight, s, false);
  return {dx, dweight, dbias};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> post_backward(const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& h) {
  const Shape s = shape_of(x, 0);
  Tensor dx = empty(x, {s.tokens, s.streams, s.dim}, kDtype<T>), dy = empty(x, {s.tokens, s.dim}, kDtype<T>);
  Tensor dh = empty(h, {s.tokens, s.columns}, ScalarType::Float);
  Rows<T> a = rows_of<T>(x);
  a.dfollowing = data<T>(grad);
  a.y = data<T>(y);
  a.h = data<float>(h);
  a.dx = data<T>(dx);
  a.dy = data<T>(dy);
  a.dh = data<float>(dh);
  torch::stable::parallel_for(0, s.tokens, 4 * kForward,
                              [&](int64_t begin, int64_t end) { post_backward_rows(a, s, begin, end); });
  return {dx, dy, dh};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> step_backward(const Tensor& dfollowing, const Tensor& du,
                                                                 const Tensor& dafter, const Tensor& x, const Tensor& y,
                                                                 const Tensor& h, const Tensor& weight,
                                                                 const Tensor& after, const Tensor& saved, double eps) {
  const Shape s = shape_of(x, eps);
  Tensor dx = empty(x, {s.tokens, s.streams, s.dim}, kDtype<T>), dy = empty(x, {s.tokens, s.dim}, kDtype<T>);
  Tensor dh = empty(h, {s.tokens, s.columns}, ScalarType::Float);
  Rows<T> a = rows_of<T>(x);
  a.dfollowing = data<T>(dfollowing);
  a.du = data<T>(du);
  a.dafter = data<float>(dafter);
  a.y = data<T>(y);
  a.h = data<float>(h);
  a.after = data<float>(after);
  a.saved = data<float>(saved);
  a.dx = data<T>(dx);
  a.dy = data<T>(dy);
  a.dh = data<float>(dh);
  const auto [dweight, dbias] = backward(a, weight, s, true);
  return {dx, dy, dh, dweight, dbias};
}

#define GRASSLAND_BY_DTYPE(x, name, ...) \
  ((x).scalar_type() == ScalarType::BFloat16 ? name<bf16>(__VA_ARGS__) : name<float>(__VA_ARGS__))

std::tuple<Tensor, Tensor, Tensor> pre_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  return GRASSLAND_BY_DTYPE(x, pre, x, weight, bias, eps);
}

Tensor post_cpu(const Tensor& x, const Tensor& y, const Tensor& h) { return GRASSLAND_BY_DTYPE(x, post, x, y, h); }

std::tuple<Tensor, Tensor, Tensor, Tensor> step_cpu(const Tensor& x, const Tensor& y, const Tensor& h, const Tensor& weight,
                                                    const Tensor& bias, double eps) {
  return GRASSLAND_BY_DTYPE(x, step, x, y, h, weight, bias, eps);
}

std::tuple<Tensor, Tensor, Tensor> pre_backward_cpu(const Tensor& du, const Tensor& dh, const Tensor& x,
                                                    const Tensor& weight, const Tensor& h, const Tensor& saved, double eps) {
  return GRASSLAND_BY_DTYPE(x, pre_backward, du, dh, x, weight, h, saved, eps);
}

std::tuple<Tensor, Tensor, Tensor> post_backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& h) {
  return GRASSLAND_BY_DTYPE(x, post_backward, grad, x, y, h);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> step_backward_cpu(const Tensor& dx, const Tensor& du, const Tensor& dh,
                                                                     const Tensor& x, const Tensor& y, const Tensor& h,
                                                                     const Tensor& weight, const Tensor& after,
                                                                     const Tensor& saved, double eps) {
  return GRASSLAND_BY_DTYPE(x, step_backward, dx, du, dh, x, y, h, weight, after, saved, eps);
}

}  // namespace
}  // namespace grassland

// Inputs are checked and made contiguous by kernels/kronecker/op.py: streams (N, n, C) and branches float32 or bfloat16
// alike, n 2, 4 or 8, coefficients and weights float32.
STABLE_TORCH_LIBRARY_FRAGMENT(grassland_cpp, m) {
  m.def("kronecker_pre(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("kronecker_post(Tensor x, Tensor y, Tensor h) -> Tensor");
  m.def(
      "kronecker_step(Tensor x, Tensor y, Tensor h, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "kronecker_pre_backward(Tensor du, Tensor dh, Tensor x, Tensor weight, Tensor h, Tensor saved, float eps) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("kronecker_post_backward(Tensor grad, Tensor x, Tensor y, Tensor h) -> (Tensor, Tensor, Tensor)");
  m.def(
      "kronecker_step_backward(Tensor dx, Tensor du, Tensor dh, Tensor x, Tensor y, Tensor h, Tensor weight, Tensor after, "
      "Tensor saved, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(grassland_cpp, CPU, m) {
  m.impl("kronecker_pre", TORCH_BOX(&grassland::pre_cpu));
  m.impl("kronecker_post", TORCH_BOX(&grassland::post_cpu));
  m.impl("kronecker_step", TORCH_BOX(&grassland::step_cpu));
  m.impl("kronecker_pre_backward", TORCH_BOX(&grassland::pre_backward_cpu));
  m.impl("kronecker_post_backward", TORCH_BOX(&grassland::post_backward_cpu));
  m.impl("kronecker_step_backward", TORCH_BOX(&grassland::step_backward_cpu));
}
