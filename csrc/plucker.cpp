// Causal Grassmann Plücker mixing on the CPU (arXiv 2512.19428; algebra in kernels/plucker/eager.py).
//
//   delta = z_{t-o} - (<z_t, z_{t-o}> / |z_t|^2) z_t,  N = |z_t| |delta| = |z_t ^ z_{t-o}|
//   y_t = 1/n_t sum_o delta / max(N, eps)              g_t = W (z_t ^ y_t) + b
//
// The wedge of a chunk of tokens is written once, meets W in one ATen product and is forgotten; the backward builds it
// again, so that nothing of size tokens x r(r-1)/2 outlives a chunk.
#include "common.h"

namespace grassland {
namespace {

// Tokens whose wedges are alive at once: 2 MB of float32 at r = 32.
constexpr int64_t kChunk = 1024;
constexpr int64_t kGrain = 64;

struct Shape {
  int64_t tokens, length, rank, pairs, dim;
};

struct Wedge {
  const float* z;
  const std::vector<int64_t>& offsets;
  float eps;
  Shape shape;
};

GRASSLAND_INLINE float dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

GRASSLAND_INLINE int64_t valid(const std::vector<int64_t>& offsets, int64_t t) {
  int64_t count = 0;
  for (const int64_t offset : offsets) count += offset <= t;
  return count;
}

// What a token's pairs leave for the backward: delta = z_s - ratio z_t, the weight 1 / (n max(N, eps)) of delta in y_t,
// and N.
struct Terms {
  float ratio, scale, norm, rest;
};

// y_t, and with `terms` (one for each offset) how it came about; a missing partner has scale 0.
GRASSLAND_INLINE void average(const Wedge& w, int64_t token, float* y, Terms* terms) {
  const int64_t r = w.shape.rank, t = token % w.shape.length, count = valid(w.offsets, t);
  const float* zt = w.z + token * r;
  std::memset(y, 0, r * sizeof(float));
  const float square = dot(zt, zt, r);
  for (size_t k = 0; k < w.offsets.size(); ++k) {
    if (terms != nullptr) terms[k] = {0, 0, 0, 0};
    if (w.offsets[k] > t) continue;
    const float* zs = zt - w.offsets[k] * r;
    const float ratio = square > 0 ? dot(zt, zs, r) / square : 0.0f;
    float rest = 0;
#pragma omp simd reduction(+ : rest)
    for (int64_t i = 0; i < r; ++i) {
      const float delta = zs[i] - ratio * zt[i];
      rest += delta * delta;
    }
    const float norm = std::sqrt(square) * std::sqrt(rest);
    const float scale = 1.0f / (std::max(norm, w.eps) * static_cast<float>(count));
    if (terms != nullptr) terms[k] = {ratio, scale, norm, rest};
#pragma omp simd
    for (int64_t i = 0; i < r; ++i) y[i] += scale * (zs[i] - ratio * zt[i]);
  }
}

// z and y with kLanes zeros behind them, so that a row of pairs may run over its end.
struct Padded {
  std::vector<float> z, y, pairs;
  explicit Padded(const Shape& s) : z(s.rank + kLanes), y(s.rank + kLanes), pairs(s.pairs + kLanes) {}
};

// pairs (i, j), i < j, in lexicographic order; each row overwrites the overrun of the row before it.
template <typename T>
GRASSLAND_INLINE void wedge(Padded& p, int64_t r, int64_t pairs, T* out) {
  float* row = p.pairs.data();
  for (int64_t i = 0; i + 1 < r; ++i) {
    const float zi = p.z[i], yi = p.y[i];
    for (int64_t j = i + 1; j < r; j += kLanes) {
      const float *zj = p.z.data() + j, *yj = p.y.data() + j;
      float* o = row + (j - i - 1);
#pragma omp simd
      for (int64_t v = 0; v < kLanes; ++v) o[v] = zi * yj[v] - zj[v] * yi;
    }
    row += r - 1 - i;
  }
#pragma omp simd
  for (int64_t k = 0; k < pairs; ++k) from_float(p.pairs[k], out[k]);
}

// dz = D y and dy = -D z for the antisymmetric D whose upper triangle is `grad`.
template <typename T>
GRASSLAND_INLINE void wedge_backward(Padded& p, int64_t r, int64_t pairs, const T* grad, float* dz, float* dy) {
  for (int64_t k = 0; k < pairs; ++k) p.pairs[k] = to_float(grad[k]);
  std::memset(dz, 0, (r + kLanes) * sizeof(float));
  std::memset(dy, 0, (r + kLanes) * sizeof(float));
  const float* row = p.pairs.data();
  for (int64_t i = 0; i + 1 < r; ++i) {
    const float zi = p.z[i], yi = p.y[i];
    float along_y[kLanes] = {}, along_z[kLanes] = {};
    for (int64_t j = i + 1; j < r; j += kLanes) {
      const float *zj = p.z.data() + j, *yj = p.y.data() + j, *g = row + (j - i - 1);
      float *dzj = dz + j, *dyj = dy + j;
#pragma omp simd
      for (int64_t v = 0; v < kLanes; ++v) {
        along_y[v] += g[v] * yj[v];
        along_z[v] += g[v] * zj[v];
        dzj[v] -= g[v] * yi;
        dyj[v] += g[v] * zi;
      }
    }
    float sum_y = 0, sum_z = 0;
#pragma omp simd reduction(+ : sum_y, sum_z)
    for (int64_t v = 0; v < kLanes; ++v) {
      sum_y += along_y[v];
      sum_z += along_z[v];
    }
    dz[i] += sum_y;
    dy[i] -= sum_z;
    row += r - 1 - i;
  }
}

// What a pair gives to its source: dz_s += scale dy_t + slope (z_s - ratio z_t).
struct Link {
  float ratio, scale, slope;
};

// The pairs of token t as targets. With h = dy_t / n, sigma = 1 / max(N, eps), kappa = -sigma^2 <h, delta> / N, which is 0
// where the norm is clamped:
//   dz_t += kappa (|delta|^2 z_t - <t,s> delta) - sigma c h        dz_s += sigma h + kappa |z_t|^2 delta
GRASSLAND_INLINE void targets_backward(const Wedge& w, int64_t token, const Terms* terms, const float* dy, float* dz,
                                       Link* links) {
  const int64_t r = w.shape.rank;
  const float* zt = w.z + token * r;
  const float square = dot(zt, zt, r);
  for (size_t k = 0; k < w.offsets.size(); ++k) {
    const Terms& p = terms[k];
    links[k] = {p.ratio, p.scale, 0};
    if (p.scale == 0) continue;
    const float* zs = zt - w.offsets[k] * r;
    float kappa = 0;
    if (p.norm > w.eps) {
      float along = 0;
#pragma omp simd reduction(+ : along)
      for (int64_t i = 0; i < r; ++i) along += dy[i] * (zs[i] - p.ratio * zt[i]);
      kappa = -p.scale * along / (p.norm * p.norm);
    }
    links[k].slope = kappa * square;
    const float inner = p.ratio * square, shrink = p.scale * p.ratio;
#pragma omp simd
    for (int64_t i = 0; i < r; ++i)
      dz[i] += kappa * (p.rest * zt[i] - inner * (zs[i] - p.ratio * zt[i])) - shrink * dy[i];
  }
}

// What flows into a token as the source of later ones, gathered in the order of the offsets.
GRASSLAND_INLINE void sources_backward(const Wedge& w, int64_t token, const float* dy, const Link* links, float* dz) {
  const int64_t r = w.shape.rank, length = w.shape.length, t = token % length;
  const int64_t many = static_cast<int64_t>(w.offsets.size());
  const float* zs = w.z + token * r;
  for (int64_t k = 0; k < many; ++k) {
    const int64_t offset = w.offsets[k];
    if (t + offset >= length) continue;
    const float *zt = zs + offset * r, *h = dy + (token + offset) * r;
    const Link& link = links[(token + offset) * many + k];
#pragma omp simd
    for (int64_t i = 0; i < r; ++i) dz[i] += link.scale * h[i] + link.slope * (zs[i] - link.ratio * zt[i]);
  }
}

template <typename T>
GRASSLAND_INLINE void wedge_rows_body(const Wedge& w, int64_t begin, int64_t end, int64_t base, T* out) {
  const Shape& s = w.shape;
  Padded p(s);
  for (int64_t token = begin; token < end; ++token) {
    std::memcpy(p.z.data(), w.z + token * s.rank, s.rank * sizeof(float));
    average(w, token, p.y.data(), nullptr);
    wedge(p, s.rank, s.pairs, out + (token - base) * s.pairs);
  }
}

GRASSLAND_MULTIARCH void wedge_rows(const Wedge& w, int64_t begin, int64_t end, int64_t base, float* out) {
  wedge_rows_body(w, begin, end, base, out);
}

GRASSLAND_MULTIARCH void wedge_rows(const Wedge& w, int64_t begin, int64_t end, int64_t base, bf16* out) {
  wedge_rows_body(w, begin, end, base, out);
}

// Gradients with respect to z (as far as the tokens' own pairs go), y and the links, tokens x rank and tokens x offsets.
struct Gradients {
  float *dz, *dy;
  Link* links;
};

template <typename T>
GRASSLAND_INLINE void wedge_rows_backward_body(const Wedge& w, int64_t begin, int64_t end, int64_t base, const T* grad,
                                               T* wedges, const Gradients& out) {
  const Shape& s = w.shape;
  Padded p(s);
  std::vector<float> dz_row(s.rank + kLanes), dy_row(s.rank + kLanes);
  std::vector<Terms> terms(w.offsets.size());
  for (int64_t token = begin; token < end; ++token) {
    std::memcpy(p.z.data(), w.z + token * s.rank, s.rank * sizeof(float));
    average(w, token, p.y.data(), terms.data());
    if (wedges != nullptr) wedge(p, s.rank, s.pairs, wedges + (token - base) * s.pairs);
    if (grad == nullptr) continue;
    wedge_backward(p, s.rank, s.pairs, grad + (token - base) * s.pairs, dz_row.data(), dy_row.data());
    targets_backward(w, token, terms.data(), dy_row.data(), dz_row.data(), out.links + token * terms.size());
    std::memcpy(out.dz + token * s.rank, dz_row.data(), s.rank * sizeof(float));
    std::memcpy(out.dy + token * s.rank, dy_row.data(), s.rank * sizeof(float));
  }
}

GRASSLAND_MULTIARCH void wedge_rows_backward(const Wedge& w, int64_t begin, int64_t end, int64_t base,
                                             const float* grad, float* wedges, const Gradients& out) {
  wedge_rows_backward_body(w, begin, end, base, grad, wedges, out);
}

GRASSLAND_MULTIARCH void wedge_rows_backward(const Wedge& w, int64_t begin, int64_t end, int64_t base, const bf16* grad,
                                             bf16* wedges, const Gradients& out) {
  wedge_rows_backward_body(w, begin, end, base, grad, wedges, out);
}

GRASSLAND_MULTIARCH void source_rows_backward(const Wedge& w, int64_t begin, int64_t end, const Gradients& out) {
  for (int64_t token = begin; token < end; ++token)
    sources_backward(w, token, out.dy, out.links, out.dz + token * w.shape.rank);
}

Shape shape_of(const Tensor& z, const Tensor& weight) {
  return {z.size(0) * z.size(1), z.size(1), z.size(2), weight.size(1), weight.size(0)};
}

// Adds the bias where at least one offset is valid; elsewhere the wedge is zero and so is the output.
template <typename T>
void add_bias(const Tensor& out, const T* bias, int64_t first_valid, const Shape& s) {
  T* o = data<T>(out);
  torch::stable::parallel_for(0, s.tokens, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      if (token % s.length < first_valid) continue;
      T* row = o + token * s.dim;
      for (int64_t c = 0; c < s.dim; ++c) from_float(to_float(row[c]) + to_float(bias[c]), row[c]);
    }
  });
}

template <typename T>
Tensor forward(const Tensor& z, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::vector<int64_t>& offsets, float eps) {
  const Shape s = shape_of(z, weight);
  const Wedge w{data<float>(z), offsets, eps, s};
  Tensor out = empty(z, {s.tokens, s.dim}, kDtype<T>);
  const Tensor transposed = torch::stable::transpose(weight, 0, 1);
  const int64_t chunk = std::min(kChunk, s.tokens);
  const Tensor wedges = empty(z, {chunk, s.pairs}, kDtype<T>);
  for (int64_t base = 0; base < s.tokens; base += chunk) {
    const int64_t stop = std::min(base + chunk, s.tokens);
    torch::stable::parallel_for(base, stop, kGrain, [&](int64_t begin, int64_t end) {
      wedge_rows(w, begin, end, base, data<T>(wedges));
    });
    mm(rows(out, base, stop), rows(wedges, 0, stop - base), transposed);
  }
  if (bias) add_bias(out, data<T>(*bias), *std::min_element(offsets.begin(), offsets.end()), s);
  return torch::stable::view(out, {z.size(0), z.size(1), s.dim});
}

// dW (float32) over the tokens of one chunk. float32 accumulates inside the product, bf16 beside it.
template <typename T>
void accumulate_weight(const Tensor& total, const Tensor& part, const Tensor& grad, const Tensor& wedges, bool first) {
  const Tensor transposed = torch::stable::transpose(grad, 0, 1);
  if (std::is_same_v<T, float>) {
    if (first) return mm(total, transposed, wedges);
    return addmm(total, transposed, wedges, 1.0);
  }
  mm(part, transposed, wedges);
  const T* p = data<T>(part);
  float* o = data<float>(total);
  torch::stable::parallel_for(0, total.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) o[k] = (first ? 0.0f : o[k]) + to_float(p[k]);
  });
}

// Sums blocks of kGrain tokens before adding them up, which keeps the rounding error of a long sum small.
template <typename T>
GRASSLAND_INLINE void sum_rows_body(const T* grad, int64_t first_valid, const Shape& s, int64_t begin, int64_t end,
                                    float* total) {
  std::vector<float> block(end - begin);
  for (int64_t base = 0; base < s.tokens; base += kGrain) {
    std::fill(block.begin(), block.end(), 0.0f);
    for (int64_t token = base; token < std::min(base + kGrain, s.tokens); ++token) {
      if (token % s.length < first_valid) continue;
      const T* row = grad + token * s.dim + begin;
      for (int64_t c = 0; c < end - begin; ++c) block[c] += to_float(row[c]);
    }
    for (int64_t c = begin; c < end; ++c) total[c] += block[c - begin];
  }
}

GRASSLAND_MULTIARCH void sum_rows(const float* grad, int64_t first_valid, const Shape& s, int64_t begin, int64_t end,
                                  float* total) {
  sum_rows_body(grad, first_valid, s, begin, end, total);
}

GRASSLAND_MULTIARCH void sum_rows(const bf16* grad, int64_t first_valid, const Shape& s, int64_t begin, int64_t end,
                                  float* total) {
  sum_rows_body(grad, first_valid, s, begin, end, total);
}

template <typename T>
Tensor bias_gradient(const Tensor& grad, int64_t first_valid, const Shape& s) {
  Tensor total = zeros(grad, {s.dim}, ScalarType::Float);
  torch::stable::parallel_for(0, s.dim, kGrain, [&](int64_t begin, int64_t end) {
    sum_rows(data<T>(grad), first_valid, s, begin, end, data<float>(total));
  });
  return total;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& z, const Tensor& weight,
                                            const std::vector<int64_t>& offsets, float eps, bool need_z, bool need_weight,
                                            bool need_bias) {
  const Shape s = shape_of(z, weight);
  const Wedge w{data<float>(z), offsets, eps, s};
  const Tensor flat = torch::stable::view(grad, {s.tokens, s.dim});
  Tensor dz = empty(z, {need_z ? s.tokens : 0, s.rank}, ScalarType::Float);
  const Tensor dy = empty(z, {need_z ? s.tokens : 0, s.rank}, ScalarType::Float);
  std::vector<Link> links(need_z ? s.tokens * offsets.size() : 0);
  const Gradients out{data<float>(dz), data<float>(dy), links.data()};
  Tensor dweight = need_weight && s.tokens > 0 ? empty(z, {s.dim, s.pairs}, ScalarType::Float)
                                               : zeros(z, {need_weight ? s.dim : 0, s.pairs}, ScalarType::Float);
  const Tensor part = empty(z, {std::is_same_v<T, float> || !need_weight ? 0 : s.dim, s.pairs}, kDtype<T>);
  const int64_t chunk = std::min(kChunk, s.tokens);
  const Tensor wedges = empty(z, {need_weight ? chunk : 0, s.pairs}, kDtype<T>);
  const Tensor dwedges = empty(z, {need_z ? chunk : 0, s.pairs}, kDtype<T>);
  for (int64_t base = 0; base < s.tokens && (need_z || need_weight); base += chunk) {
    const int64_t stop = std::min(base + chunk, s.tokens);
    const Tensor g = rows(flat, base, stop);
    if (need_z) mm(rows(dwedges, 0, stop - base), g, weight);
    torch::stable::parallel_for(base, stop, kGrain, [&](int64_t begin, int64_t end) {
      wedge_rows_backward(w, begin, end, base, need_z ? data<T>(dwedges) : nullptr,
                          need_weight ? data<T>(wedges) : nullptr, out);
    });
    if (need_weight) accumulate_weight<T>(dweight, part, g, rows(wedges, 0, stop - base), base == 0);
  }
  if (need_z) {
    torch::stable::parallel_for(0, s.tokens, kGrain, [&](int64_t begin, int64_t end) {
      source_rows_backward(w, begin, end, out);
    });
  }
  const int64_t first_valid = *std::min_element(offsets.begin(), offsets.end());
  Tensor dbias = need_bias ? bias_gradient<T>(flat, first_valid, s) : zeros(z, {0}, ScalarType::Float);
  if (need_z) dz = torch::stable::view(dz, {z.size(0), z.size(1), s.rank});
  return {dz, dweight, dbias};
}

Tensor plucker_mix_cpu(const Tensor& z, const Tensor& weight, std::optional<Tensor> bias, std::vector<int64_t> offsets,
                       double eps) {
  return weight.scalar_type() == ScalarType::BFloat16
             ? forward<bf16>(z, weight, bias, offsets, static_cast<float>(eps))
             : forward<float>(z, weight, bias, offsets, static_cast<float>(eps));
}

std::tuple<Tensor, Tensor, Tensor> plucker_mix_backward_cpu(const Tensor& grad, const Tensor& z, const Tensor& weight,
                                                            std::vector<int64_t> offsets, double eps, bool need_z,
                                                            bool need_weight, bool need_bias) {
  return weight.scalar_type() == ScalarType::BFloat16
             ? backward<bf16>(grad, z, weight, offsets, static_cast<float>(eps), need_z, need_weight, need_bias)
             : backward<float>(grad, z, weight, offsets, static_cast<float>(eps), need_z, need_weight, need_bias);
}

}  // namespace
}  // namespace grassland

// Inputs are checked and made contiguous by kernels/plucker/op.py: z float32, the rest float32 or bfloat16 alike.
STABLE_TORCH_LIBRARY_FRAGMENT(grassland_cpp, m) {
  m.def("plucker_mix(Tensor z, Tensor weight, Tensor? bias, int[] offsets, float eps) -> Tensor");
  m.def(
      "plucker_mix_backward(Tensor grad, Tensor z, Tensor weight, int[] offsets, float eps, bool need_z, "
      "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(grassland_cpp, CPU, m) {
  m.impl("plucker_mix", TORCH_BOX(&grassland::plucker_mix_cpu));
  m.impl("plucker_mix_backward", TORCH_BOX(&grassland::plucker_mix_backward_cpu));
}
