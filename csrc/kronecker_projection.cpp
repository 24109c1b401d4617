// The projection of KromHC's coefficients from a sublayer's parameters, and the way back (algebra in
// kernels/kronecker/reference.py). With s_c = sqrt(n C) (1 + gamma_c):
//
//   weight = s_c [ pre A_ck | post B_ck | mixing (A_c,n+2j+1 - A_c,n+2j) ]^T        A (n C, n + 2 K), B (n C, n)
#include "common.h"

namespace grassland::kronecker {
namespace {

// Channels of a block: their rows of A stay in the L1 cache while each of its columns is read.
constexpr int64_t kBlock = 256;

struct Projection {
  const float *alpha, *beta, *gamma;
  float pre, post, mixing;
  int64_t width, n, stages;
  int64_t columns() const { return n + 2 * stages; }
  double scale(int64_t c) const { return std::sqrt(static_cast<double>(width)) * (1.0 + gamma[c]); }
};

struct ProjectionGradient {
  float *alpha, *beta, *gamma;
  double pre = 0, post = 0, mixing = 0;
};

GRASSLAND_MULTIARCH void fold(const Projection& p, float* weight) {
  const int64_t n = p.n, columns = p.columns();
  for (int64_t first = 0; first < p.width; first += kBlock) {
    const int64_t count = std::min(kBlock, p.width - first);
    const float *a = p.alpha + first * columns, *b = p.beta + first * n;
    float scale[kBlock];
    for (int64_t c = 0; c < count; ++c) scale[c] = static_cast<float>(p.scale(first + c));
    float* out = weight + first;
    for (int64_t k = 0; k < n; ++k, out += p.width)
      for (int64_t c = 0; c < count; ++c) out[c] = p.pre * scale[c] * a[c * columns + k];
    for (int64_t k = 0; k < n; ++k, out += p.width)
      for (int64_t c = 0; c < count; ++c) out[c] = p.post * scale[c] * b[c * n + k];
    for (int64_t k = n; k < columns; k += 2, out += p.width)
      for (int64_t c = 0; c < count; ++c) out[c] = p.mixing * scale[c] * (a[c * columns + k + 1] - a[c * columns + k]);
  }
}

GRASSLAND_MULTIARCH void unfold(const Projection& p, const float* dweight, ProjectionGradient& d) {
  const int64_t n = p.n, columns = p.columns();
  for (int64_t first = 0; first < p.width; first += kBlock) {
    const int64_t count = std::min(kBlock, p.width - first);
    const float *a = p.alpha + first * columns, *b = p.beta + first * n, *g = dweight + first;
    float *da = d.alpha + first * columns, *db = d.beta + first * n;
    // <dweight, columns of A or B>, channel by channel; in double, since the three scalars' sums over all may cancel.
    float scale[kBlock];
    double pre[kBlock] = {}, post[kBlock] = {}, mixing[kBlock] = {};
    for (int64_t c = 0; c < count; ++c) scale[c] = static_cast<float>(p.scale(first + c));
    for (int64_t k = 0; k < n; ++k, g += p.width)
      for (int64_t c = 0; c < count; ++c) {
        da[c * columns + k] = p.pre * scale[c] * g[c];
        pre[c] += static_cast<double>(a[c * columns + k]) * g[c];
      }
    for (int64_t k = 0; k < n; ++k, g += p.width)
      for (int64_t c = 0; c < count; ++c) {
        db[c * n + k] = p.post * scale[c] * g[c];
        post[c] += static_cast<double>(b[c * n + k]) * g[c];
      }
    for (int64_t k = n; k < columns; k += 2, g += p.width)
      for (int64_t c = 0; c < count; ++c) {
        const float along = p.mixing * scale[c] * g[c];
        da[c * columns + k] = -along;
        da[c * columns + k + 1] = along;
        mixing[c] += (static_cast<double>(a[c * columns + k + 1]) - a[c * columns + k]) * g[c];
      }
    const double root = std::sqrt(static_cast<double>(p.width));
    for (int64_t c = 0; c < count; ++c) {
      d.gamma[first + c] = static_cast<float>(root * (p.pre * pre[c] + p.post * post[c] + p.mixing * mixing[c]));
      d.pre += p.scale(first + c) * pre[c];
      d.post += p.scale(first + c) * post[c];
      d.mixing += p.scale(first + c) * mixing[c];
    }
  }
}

Projection projection(const Tensor& alpha, const Tensor& beta, const Tensor& gamma, const Tensor& pre, const Tensor& post,
                      const Tensor& mixing) {
  const int64_t width = alpha.size(0), n = beta.size(1);
  return {data<float>(alpha), data<float>(beta),   data<float>(gamma), *data<float>(pre), *data<float>(post),
          *data<float>(mixing), width, n, (alpha.size(1) - n) / 2};
}

std::tuple<Tensor, Tensor> projection_cpu(const Tensor& alpha, const Tensor& beta, const Tensor& gamma, const Tensor& pre,
                                          const Tensor& post, const Tensor& mixing, const Tensor& static_alpha,
                                          const Tensor& static_beta) {
  const Projection p = projection(alpha, beta, gamma, pre, post, mixing);
  const int64_t rows = 2 * p.n + p.stages;
  const Tensor weight = empty(alpha, {rows, p.width}, ScalarType::Float), bias = empty(alpha, {rows}, ScalarType::Float);
  fold(p, data<float>(weight));
  const float* a = data<float>(static_alpha);
  float* out = std::copy_n(data<float>(static_beta), p.n, std::copy_n(a, p.n, data<float>(bias)));
  for (a += p.n; out != data<float>(bias) + rows; a += 2) *out++ = a[1] - a[0];
  return {weight, bias};
}

// (dalpha, dbeta, dgamma, dscales (3), dstatic_alpha, dstatic_beta)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> projection_backward_cpu(
    const Tensor& dweight, const Tensor& dbias, const Tensor& alpha, const Tensor& beta, const Tensor& gamma,
    const Tensor& pre, const Tensor& post, const Tensor& mixing) {
  const Projection p = projection(alpha, beta, gamma, pre, post, mixing);
  const auto made = [&](std::vector<int64_t> sizes) { return empty(alpha, std::move(sizes), ScalarType::Float); };
  const Tensor dalpha = made({p.width, p.columns()}), dbeta = made({p.width, p.n}), dgamma = made({p.width});
  const Tensor dscales = made({3}), dstatic_alpha = made({p.columns()}), dstatic_beta = made({p.n});
  ProjectionGradient d{data<float>(dalpha), data<float>(dbeta), data<float>(dgamma)};
  unfold(p, data<float>(dweight), d);
  data<float>(dscales)[0] = static_cast<float>(d.pre);
  data<float>(dscales)[1] = static_cast<float>(d.post);
  data<float>(dscales)[2] = static_cast<float>(d.mixing);
  const float* g = data<float>(dbias);
  float* out = std::copy_n(g, p.n, data<float>(dstatic_alpha));
  std::copy_n(g + p.n, p.n, data<float>(dstatic_beta));
  for (int64_t j = 0; j < p.stages; ++j) {
    *out++ = -g[2 * p.n + j];
    *out++ = g[2 * p.n + j];
  }
  return {dalpha, dbeta, dgamma, dscales, dstatic_alpha, dstatic_beta};
}

}  // namespace
}  // namespace grassland::kronecker

// All tensors contiguous float32: alpha (n C, n + 2 K), beta (n C, n), gamma (n C), pre, post and mixing one number each,
// static_alpha (n + 2 K), static_beta (n). Forward: weight (2 n + K, n C) and bias (2 n + K).
STABLE_TORCH_LIBRARY_FRAGMENT(grassland_cpp, m) {
  m.def(
      "kronecker_projection(Tensor alpha, Tensor beta, Tensor gamma, Tensor pre, Tensor post, Tensor mixing, "
      "Tensor static_alpha, Tensor static_beta) -> (Tensor, Tensor)");
  m.def(
      "kronecker_projection_backward(Tensor dweight, Tensor dbias, Tensor alpha, Tensor beta, Tensor gamma, Tensor pre, "
      "Tensor post, Tensor mixing) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(grassland_cpp, CPU, m) {
  m.impl("kronecker_projection", TORCH_BOX(&grassland::kronecker::projection_cpu));
  m.impl("kronecker_projection_backward", TORCH_BOX(&grassland::kronecker::projection_backward_cpu));
}
