// The gate of Grassmann mixing on the CPU: alpha = sigmoid(W [x; g] + b), out = alpha x + (1 - alpha) g.
//
// The concatenation is never written: both halves of W accumulate into one buffer, which one pass turns into alpha and
// out. The backward turns the output gradient into those of x, g and the gate's logits in one pass, and the products
// with W accumulate onto them.
#include "common.h"

namespace grassland {
namespace {

constexpr int64_t kGrain = 1 << 13;

template <typename T>
GRASSLAND_INLINE void blend_body(const T* x, const T* g, const T* bias, int64_t begin, int64_t end, int64_t dim,
                                 T* alpha, T* out) {
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

GRASSLAND_MULTIARCH void blend_rows(const float* x, const float* g, const float* bias, int64_t begin, int64_t end,
                                    int64_t dim, float* alpha, float* out) {
  blend_body(x, g, bias, begin, end, dim, alpha, out);
}

GRASSLAND_MULTIARCH void blend_rows(const bf16* x, const bf16* g, const bf16* bias, int64_t begin, int64_t end,
                                    int64_t dim, bf16* alpha, bf16* out) {
  blend_body(x, g, bias, begin, end, dim, alpha, out);
}

// dx = alpha dout, dg = (1 - alpha) dout, dlogit = dout (x - g) alpha (1 - alpha)
template <typename T>
GRASSLAND_INLINE void blend_backward_body(const T* grad, const T* x, const T* g, const T* alpha, int64_t begin,
                                          int64_t end, T* dx, T* dg, T* dlogit) {
#pragma omp simd
  for (int64_t k = begin; k < end; ++k) {
    const float a = to_float(alpha[k]), d = to_float(grad[k]);
    const float through = a * d;
    from_float(through, dx[k]);
    from_float(d - through, dg[k]);
    from_float(through * (1.0f - a) * (to_float(x[k]) - to_float(g[k])), dlogit[k]);
  }
}

GRASSLAND_MULTIARCH void blend_backward_rows(const float* grad, const float* x, const float* g, const float* alpha,
                                             int64_t begin, int64_t end, float* dx, float* dg, float* dlogit) {
  blend_backward_body(grad, x, g, alpha, begin, end, dx, dg, dlogit);
}

GRASSLAND_MULTIARCH void blend_backward_rows(const bf16* grad, const bf16* x, const bf16* g, const bf16* alpha,
                                             int64_t begin, int64_t end, bf16* dx, bf16* dg, bf16* dlogit) {
  blend_backward_body(grad, x, g, alpha, begin, end, dx, dg, dlogit);
}

Tensor half(const Tensor& weight, int64_t which, int64_t dim) {
  Tensor base = weight;
  return torch::stable::narrow(base, 1, which * dim, dim);
}

template <typename T>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& g, const Tensor& weight, const Tensor& bias) {
  const int64_t tokens = x.size(0), dim = x.size(1);
  const Tensor out = empty(x, {tokens, dim}, kDtype<T>), alpha = empty(x, {tokens, dim}, kDtype<T>);
  if (tokens == 0) return {out, alpha};
  mm(alpha, x, torch::stable::transpose(half(weight, 0, dim), 0, 1));
  addmm(alpha, g, torch::stable::transpose(half(weight, 1, dim), 0, 1), 1.0);
  torch::stable::parallel_for(0, tokens, std::max<int64_t>(1, kGrain / dim), [&](int64_t begin, int64_t end) {
    blend_rows(data<T>(x), data<T>(g), data<T>(bias), begin, end, dim, data<T>(alpha), data<T>(out));
  });
  return {out, alpha};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& g, const Tensor& weight,
                                            const Tensor& alpha) {
  const int64_t tokens = x.size(0), dim = x.size(1);
  const Tensor dx = empty(x, {tokens, dim}, kDtype<T>), dg = empty(x, {tokens, dim}, kDtype<T>);
  const Tensor dlogit = empty(x, {tokens, dim}, kDtype<T>);
  if (tokens == 0) return {dx, dg, dlogit};
  torch::stable::parallel_for(0, tokens * dim, kGrain, [&](int64_t begin, int64_t end) {
    blend_backward_rows(data<T>(grad), data<T>(x), data<T>(g), data<T>(alpha), begin, end, data<T>(dx), data<T>(dg),
                        data<T>(dlogit));
  });
  addmm(dx, dlogit, half(weight, 0, dim), 1.0);
  addmm(dg, dlogit, half(weight, 1, dim), 1.0);
  return {dx, dg, dlogit};
}

std::tuple<Tensor, Tensor> gated_blend_cpu(const Tensor& x, const Tensor& g, const Tensor& weight, const Tensor& bias) {
  return x.scalar_type() == ScalarType::BFloat16 ? forward<bf16>(x, g, weight, bias)
                                                 : forward<float>(x, g, weight, bias);
}

std::tuple<Tensor, Tensor, Tensor> gated_blend_backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& g,
                                                            const Tensor& weight, const Tensor& alpha) {
  return x.scalar_type() == ScalarType::BFloat16 ? backward<bf16>(grad, x, g, weight, alpha)
                                                 : backward<float>(grad, x, g, weight, alpha);
}

}  // namespace
}  // namespace grassland

// All tensors contiguous and of one dtype, float32 or bfloat16; x, g (tokens, d), weight (d, 2 d), bias (d).
// Forward: (out, alpha). Backward: (dx, dg, dlogit); the weight's gradient is dlogit^T [x; g].
STABLE_TORCH_LIBRARY_FRAGMENT(grassland_cpp, m) {
  m.def("gated_blend(Tensor x, Tensor g, Tensor weight, Tensor bias) -> (Tensor, Tensor)");
  m.def(
      "gated_blend_backward(Tensor grad, Tensor x, Tensor g, Tensor weight, Tensor alpha) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(grassland_cpp, CPU, m) {
  m.impl("gated_blend", TORCH_BOX(&grassland::gated_blend_cpu));
  m.impl("gated_blend_backward", TORCH_BOX(&grassland::gated_blend_backward_cpu));
}
