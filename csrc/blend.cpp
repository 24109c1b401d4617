// The gate of Grassmann mixing on the CPU: alpha = sigmoid(W [x; g] + b), out = alpha x + (1 - alpha) g.
//
// The concatenation is never written: the products with both halves of W are one sum, which one pass turns into alpha and
// out. The backward turns the output gradient into those of x, g and the gate's logits in one pass, and the products
// with W accumulate onto them.
#include "linear.h"

namespace grassland {
namespace {

constexpr int64_t kGrain = 1 << 13;

// X is the type of x and out, T that of the matrices: a float32 stream beside half-precision products is the rule under
// autocast.
template <typename X, typename T>
GRASSLAND_INLINE void blend_body(const X* x, const T* g, const T* bias, int64_t begin, int64_t end, int64_t dim,
                                 T* alpha, X* out) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * dim;
#pragma omp simd
    for (int64_t c = 0; c < dim; ++c) {
      const float a = sigmoid(to_float(alpha[at + c]) + to_float(bias[c]));
      const float gv = to_float(g[at + c]);
      from_float(a, alpha[at + c]);
      from_float(gv + a * (to_float(x[at + c]) - gv), out[at + c]);
    }
  }
}

// dx = alpha dout, dg = (1 - alpha) dout, dlogit = dout (x - g) alpha (1 - alpha)
template <typename X, typename T>
GRASSLAND_INLINE void blend_backward_body(const X* grad, const X* x, const T* g, const T* alpha, int64_t begin,
                                          int64_t end, X* dx, T* dg, T* dlogit) {
#pragma omp simd
  for (int64_t k = begin; k < end; ++k) {
    const float a = to_float(alpha[k]), d = to_float(grad[k]);
    const float through = a * d;
    from_float(through, dx[k]);
    from_float(d - through, dg[k]);
    from_float(through * (1.0f - a) * (to_float(x[k]) - to_float(g[k])), dlogit[k]);
  }
}

#define GRASSLAND_BLEND(X, T)                                                                                       \
  GRASSLAND_MULTIARCH void blend_rows(const X* x, const T* g, const T* bias, int64_t begin, int64_t end, int64_t dim, \
                                      T* alpha, X* out) {                                                          \
    blend_body(x, g, bias, begin, end, dim, alpha, out);                                                           \
  }                                                                                                                \
  GRASSLAND_MULTIARCH void blend_backward_rows(const X* grad, const X* x, const T* g, const T* alpha, int64_t begin, \
                                               int64_t end, X* dx, T* dg, T* dlogit) {                             \
    blend_backward_body(grad, x, g, alpha, begin, end, dx, dg, dlogit);                                            \
  }
GRASSLAND_BLEND(float, float)
GRASSLAND_BLEND(float, bf16)
GRASSLAND_BLEND(bf16, bf16)

Tensor half(const Tensor& weight, int64_t which, int64_t dim) {
  Tensor base = weight;
  return torch::stable::narrow(base, 1, which * dim, dim);
}

template <typename X, typename T>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& operand, const Tensor& g, const Tensor& weight,
                                   const Tensor& bias) {
  const int64_t tokens = x.size(0), dim = x.size(1);
  const Tensor out = empty(x, {tokens, dim}, kDtype<X>);
  if (out.numel() == 0) return {out, empty(x, {tokens, dim}, kDtype<T>)};
  const Tensor alpha = plus_linear(linear(operand, half(weight, 0, dim)), g, half(weight, 1, dim));
  torch::stable::parallel_for(0, tokens, std::max<int64_t>(1, kGrain / dim), [&](int64_t begin, int64_t end) {
    blend_rows(data<X>(x), data<T>(g), data<T>(bias), begin, end, dim, data<T>(alpha), data<X>(out));
  });
  return {out, alpha};
}

template <typename X, typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& operand,
                                                    const Tensor& g, const Tensor& weight, const Tensor& alpha) {
  const int64_t tokens = x.size(0), dim = x.size(1);
  Tensor dx = empty(x, {tokens, dim}, kDtype<X>), dg = empty(x, {tokens, dim}, kDtype<T>);
  const Tensor dlogit = empty(x, {tokens, dim}, kDtype<T>);
  if (dx.numel() == 0) return {dx, dg, dlogit, zeros(x, {dim, 2 * dim}, kDtype<T>)};
  torch::stable::parallel_for(0, tokens * dim, kGrain, [&](int64_t begin, int64_t end) {
    blend_backward_rows(data<X>(grad), data<X>(x), data<T>(g), data<T>(alpha), begin, end, data<X>(dx), data<T>(dg),
                        data<T>(dlogit));
  });
  if (std::is_same_v<X, T>) dx = plus_linear(dx, dlogit, flipped(half(weight, 0, dim)));
  dg = plus_linear(dg, dlogit, flipped(half(weight, 1, dim)));
  const Tensor dweight = empty(x, {dim, 2 * dim}, kDtype<T>);
  outer_product(half(dweight, 0, dim), dlogit, operand, false);
  outer_product(half(dweight, 1, dim), dlogit, g, false);
  return {dx, dg, dlogit, dweight};
}

std::tuple<Tensor, Tensor> gated_blend_cpu(const Tensor& x, const Tensor& operand, const Tensor& g,
                                           const Tensor& weight, const Tensor& bias) {
  if (is_half(x)) return forward<bf16, bf16>(x, operand, g, weight, bias);
  return is_half(g) ? forward<float, bf16>(x, operand, g, weight, bias)
                    : forward<float, float>(x, operand, g, weight, bias);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_blend_backward_cpu(const Tensor& grad, const Tensor& x,
                                                                    const Tensor& operand, const Tensor& g,
                                                                    const Tensor& weight, const Tensor& alpha) {
  if (is_half(x)) return backward<bf16, bf16>(grad, x, operand, g, weight, alpha);
  return is_half(g) ? backward<float, bf16>(grad, x, operand, g, weight, alpha)
                    : backward<float, float>(grad, x, operand, g, weight, alpha);
}

}  // namespace
}  // namespace grassland

// All tensors contiguous; x, g (tokens, d), weight (d, 2 d), bias (d); all float32, all bfloat16, or x (and grad) float32
// and the rest bfloat16; operand is x in the dtype of g. Forward: (out, alpha). Backward: (dx, dg, dlogit, dweight), where
// dx lacks dlogit W_x if the dtypes differ, and dweight = dlogit^T [x; g].
STABLE_TORCH_LIBRARY_FRAGMENT(grassland_cpp, m) {
  m.def("gated_blend(Tensor x, Tensor operand, Tensor g, Tensor weight, Tensor bias) -> (Tensor, Tensor)");
  m.def(
      "gated_blend_backward(Tensor grad, Tensor x, Tensor operand, Tensor g, Tensor weight, Tensor alpha) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(grassland_cpp, CPU, m) {
  m.impl("gated_blend", TORCH_BOX(&grassland::gated_blend_cpu));
  m.impl("gated_blend_backward", TORCH_BOX(&grassland::gated_blend_backward_cpu));
}
