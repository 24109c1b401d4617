// The operators of KromHC on the CPU: blocks of tokens through what kronecker.h declares.
#include "kronecker.h"
#include "vec.h"

namespace grassland::kronecker {
namespace {

#define GRASSLAND_SOURCE "kronecker_rows.h"
#include "units.h"

// Parts of the weight gradient: at most this many, each of at least this many tokens. Independent of the threads.
constexpr int64_t kMostParts = 64;
constexpr int64_t kLeastTokens = 128;

Shape shape_of(const Tensor& x, double eps) {
  Shape s{x.size(0), x.size(1), x.size(2), 0, 0, 0, static_cast<float>(eps)};
  s.columns = 2 * s.streams + stages(s.streams);
  s.padded_dim = (s.dim + kLanes - 1) / kLanes * kLanes;
  s.padded_columns = (s.columns + kGroup - 1) / kGroup * kGroup;
  return s;
}

// f(packed offset, plain offset, size) for each piece of the weight (columns, n C) that is contiguous in both layouts.
template <typename F>
void for_each_piece(const Shape& s, F&& f) {
  for (int64_t j = 0; j < s.columns; ++j)
    for (int64_t k = 0; k < s.streams; ++k)
      for (int64_t c = 0; c < s.dim; c += kLanes)
        f(s.packed(k, c) + j * kLanes, (j * s.streams + k) * s.dim + c, std::min(kLanes, s.dim - c));
}

// The weight as the kernels read it, with zeros up to whole groups of columns and whole vectors.
Tensor pack(const Tensor& weight, const Shape& s) {
  Tensor packed = zeros(weight, {s.packed()}, ScalarType::Float);
  float *to = data<float>(packed), *from = data<float>(weight);
  for_each_piece(s, [&](int64_t a, int64_t b, int64_t size) { std::memcpy(to + a, from + b, size * sizeof(float)); });
  return packed;
}

template <typename F>
void for_each_block(int64_t begin, int64_t end, F&& f) {
  for (int64_t base = begin; base < end; base += kTokens) f(base, std::min(kTokens, end - base));
}

template <typename T>
Upcoming<T> upcoming(const T* x, const Shape& s, int64_t from, int64_t end) {
  return {x + std::min(from, end) * s.row(), std::max<int64_t>(0, std::min(kTokens, end - from))};
}

template <typename T>
Ending<T> ending(const Tensor& x, const Tensor& y, const Tensor& h) {
  return {data<T>(x), data<T>(y), data<float>(h)};
}

struct Begun {
  Tensor u, h, saved;
  Begun(const Tensor& x, const Shape& s, ScalarType dtype)
      : u(empty(x, {s.tokens, s.dim}, dtype)),
        h(empty(x, {s.tokens, s.columns}, ScalarType::Float)),
        saved(empty(x, {s.tokens, s.columns + 1}, ScalarType::Float)) {}
};

// Coefficients and pre-mix of all tokens. `before`, called for a block first, makes its rows of `x`; `source` are those
// that it reads, or x.
template <typename T, typename F>
Begun begin_all(const T* x, const T* source, const Tensor& like, const Tensor& weight, const Tensor& bias, const Shape& s,
                F&& before) {
  Begun out(like, s, kDtype<T>);
  const Tensor packed = pack(weight, s);
  const float *w = data<float>(packed), *b = data<float>(bias);
  const Beginning<T> to{data<T>(out.u), data<float>(out.h), data<float>(out.saved)};
  torch::stable::parallel_for(0, s.tokens, 2 * kTokens, [&](int64_t first, int64_t last) {
    std::vector<float> sums(kTokens * s.padded_columns * kLanes);
    for_each_block(first, last, [&](int64_t base, int64_t count) {
      before(base, count);
      const Upcoming<T> next = upcoming(source, s, base + count, last);
      GRASSLAND_BEST(begin)(x + base * s.row(), w, b, to.at(base, s), s, count, sums.data(), next);
    });
  });
  return out;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> pre(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  const Shape s = shape_of(x, eps);
  const Begun b = begin_all<T>(data<T>(x), data<T>(x), x, weight, bias, s, [](int64_t, int64_t) {});
  return {b.u, b.h, b.saved};
}

template <typename T>
Tensor post(const Tensor& x, const Tensor& y, const Tensor& h) {
  const Shape s = shape_of(x, 0);
  const Tensor out = empty(x, {s.tokens, s.streams, s.dim}, kDtype<T>);
  const Ending<T> a = ending<T>(x, y, h);
  torch::stable::parallel_for(0, s.tokens, 2 * kTokens, [&](int64_t first, int64_t last) {
    GRASSLAND_BEST(mix)(a.at(first, s), s, last - first, data<T>(out) + first * s.row());
  });
  return out;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> step(const Tensor& x, const Tensor& y, const Tensor& h, const Tensor& weight,
                                                const Tensor& bias, double eps) {
  const Shape s = shape_of(x, eps);
  const Tensor out = empty(x, {s.tokens, s.streams, s.dim}, kDtype<T>);
  const Ending<T> a = ending<T>(x, y, h);
  T* following = data<T>(out);
  const Begun b = begin_all<T>(following, a.x, x, weight, bias, s, [&](int64_t base, int64_t count) {
    GRASSLAND_BEST(mix)(a.at(base, s), s, count, following + base * s.row());
  });
  return {out, b.u, b.h, b.saved};
}

// Parts of the tokens whose weight gradients are summed apart, then together, in an order that no thread count changes.
struct Parts {
  int64_t size, count;
  explicit Parts(int64_t tokens) {
    const int64_t even = (tokens + kMostParts - 1) / kMostParts;
    size = (std::max(kLeastTokens, even) + kTokens - 1) / kTokens * kTokens;
    count = (tokens + size - 1) / size;
  }
};

// (dweight, dbias), from f(first token, last, packed weight, dweight in that layout and dbias, both zero at first).
template <typename F>
std::tuple<Tensor, Tensor> sum_parts(const Tensor& weight, const Shape& s, F&& f) {
  const Tensor dweight = zeros(weight, {s.columns, s.row()}, ScalarType::Float);
  const Tensor dbias = zeros(weight, {s.columns}, ScalarType::Float);
  const Tensor packed = pack(weight, s);
  const Parts parts(s.tokens);
  const int64_t matrix = s.packed(), stride = matrix + s.columns;
  const Tensor partial = empty(weight, {parts.count, stride}, ScalarType::Float);
  const Tensor sum = zeros(weight, {stride}, ScalarType::Float);
  torch::stable::parallel_for(0, parts.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      float* own = data<float>(partial) + p * stride;
      std::memset(own, 0, stride * sizeof(float));
      f(p * parts.size, std::min((p + 1) * parts.size, s.tokens), data<float>(packed), own, own + matrix);
    }
  });
  torch::stable::parallel_for(0, stride, 1 << 12, [&](int64_t begin, int64_t end) {
    for (int64_t p = 0; p < parts.count; ++p)
      GRASSLAND_BEST(add)(data<float>(partial) + p * stride + begin, end - begin, data<float>(sum) + begin);
  });
  float *to = data<float>(dweight), *from = data<float>(sum);
  for_each_piece(s, [&](int64_t a, int64_t b, int64_t size) { std::memcpy(to + b, from + a, size * sizeof(float)); });
  std::memcpy(data<float>(dbias), from + matrix, s.columns * sizeof(float));
  return {dweight, dbias};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> pre_backward(const std::optional<Tensor>& dx, const Tensor& du, const Tensor& dh,
                                                const Tensor& x, const Tensor& weight, const Tensor& h, const Tensor& saved,
                                                double eps) {
  const Shape s = shape_of(x, eps);
  const Tensor out = empty(x, {s.tokens, s.streams, s.dim}, kDtype<T>);
  const BeginningGradient<T> g{data<T>(du), dx ? data<T>(*dx) : nullptr, data<float>(dh), data<float>(h),
                               data<float>(saved)};
  const T* streams = data<T>(x);
  const auto [dweight, dbias] =
      sum_parts(weight, s, [&](int64_t first, int64_t last, const float* w, float* dw, float* db) {
        LogitGradients logits(s);
        for_each_block(first, last, [&](int64_t base, int64_t count) {
          const T* rows = streams + base * s.row();
          GRASSLAND_BEST(logits_backward)(rows, g.at(base, s), s, count, logits, db);
          GRASSLAND_BEST(streams_backward)(rows, g.at(base, s), s, count, logits, w, dw, data<T>(out) + base * s.row(),
                                           upcoming(streams, s, base + count, last));
        });
      });
  return {out, dweight, dbias};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> post_backward(const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& h) {
  const Shape s = shape_of(x, 0);
  const Tensor dx = empty(x, {s.tokens, s.streams, s.dim}, kDtype<T>), dy = empty(x, {s.tokens, s.dim}, kDtype<T>);
  const Tensor dh = empty(h, {s.tokens, s.columns}, ScalarType::Float);
  const Ending<T> a = ending<T>(x, y, h);
  const EndingGradient<T> d{data<T>(dx), data<T>(dy), data<float>(dh)};
  torch::stable::parallel_for(0, s.tokens, 2 * kTokens, [&](int64_t first, int64_t last) {
    GRASSLAND_BEST(mix_backward)(a.at(first, s), d.at(first, s), s, last - first, data<T>(grad) + first * s.row());
  });
  return {dx, dy, dh};
}

// X' of a block is computed again, and its gradient stays in the cache.
template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> step_backward(const Tensor& dfollowing, const Tensor& du,
                                                                 const Tensor& dafter, const Tensor& x, const Tensor& y,
                                                                 const Tensor& h, const Tensor& weight,
                                                                 const Tensor& after, const Tensor& saved, double eps) {
  const Shape s = shape_of(x, eps);
  const Tensor dx = empty(x, {s.tokens, s.streams, s.dim}, kDtype<T>), dy = empty(x, {s.tokens, s.dim}, kDtype<T>);
  const Tensor dh = empty(h, {s.tokens, s.columns}, ScalarType::Float);
  const Ending<T> a = ending<T>(x, y, h);
  const EndingGradient<T> d{data<T>(dx), data<T>(dy), data<float>(dh)};
  const BeginningGradient<T> g{data<T>(du), data<T>(dfollowing), data<float>(dafter), data<float>(after),
                               data<float>(saved)};
  const auto [dweight, dbias] =
      sum_parts(weight, s, [&](int64_t first, int64_t last, const float* w, float* dw, float* db) {
        LogitGradients logits(s);
        std::vector<T> following(kTokens * s.row());
        std::vector<float> grad(kTokens * s.row());
        for_each_block(first, last, [&](int64_t base, int64_t count) {
          GRASSLAND_BEST(mix)(a.at(base, s), s, count, following.data());
          GRASSLAND_BEST(logits_backward)(following.data(), g.at(base, s), s, count, logits, db);
          GRASSLAND_BEST(streams_backward)(following.data(), g.at(base, s), s, count, logits, w, dw, grad.data(),
                                           upcoming(a.x, s, base + count, last));
          GRASSLAND_BEST(mix_backward)(a.at(base, s), d.at(base, s), s, count, grad.data());
        });
      });
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

std::tuple<Tensor, Tensor, Tensor> pre_backward_cpu(const std::optional<Tensor>& dx, const Tensor& du, const Tensor& dh,
                                                    const Tensor& x, const Tensor& weight, const Tensor& h,
                                                    const Tensor& saved, double eps) {
  return GRASSLAND_BY_DTYPE(x, pre_backward, dx, du, dh, x, weight, h, saved, eps);
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
}  // namespace grassland::kronecker

// Inputs are checked and made contiguous by kernels/kronecker/op.py: streams (N, n, C) and branches float32 or bfloat16
// alike, n a power of two from 2 to 32, coefficients and weights float32.
STABLE_TORCH_LIBRARY_FRAGMENT(grassland_cpp, m) {
  m.def("kronecker_pre(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("kronecker_post(Tensor x, Tensor y, Tensor h) -> Tensor");
  m.def(
      "kronecker_step(Tensor x, Tensor y, Tensor h, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "kronecker_pre_backward(Tensor? dx, Tensor du, Tensor dh, Tensor x, Tensor weight, Tensor h, Tensor saved, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("kronecker_post_backward(Tensor grad, Tensor x, Tensor y, Tensor h) -> (Tensor, Tensor, Tensor)");
  m.def(
      "kronecker_step_backward(Tensor dx, Tensor du, Tensor dh, Tensor x, Tensor y, Tensor h, Tensor weight, Tensor after, "
      "Tensor saved, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(grassland_cpp, CPU, m) {
  m.impl("kronecker_pre", TORCH_BOX(&grassland::kronecker::pre_cpu));
  m.impl("kronecker_post", TORCH_BOX(&grassland::kronecker::post_cpu));
  m.impl("kronecker_step", TORCH_BOX(&grassland::kronecker::step_cpu));
  m.impl("kronecker_pre_backward", TORCH_BOX(&grassland::kronecker::pre_backward_cpu));
  m.impl("kronecker_post_backward", TORCH_BOX(&grassland::kronecker::post_backward_cpu));
  m.impl("kronecker_step_backward", TORCH_BOX(&grassland::kronecker::step_backward_cpu));
}
