// Causal Grassmann Plücker mixing on the CPU (arXiv 2512.19428; algebra in kernels/plucker/eager.py).
//
//   delta = z_{t-o} - (<z_t, z_{t-o}> / |z_t|^2) z_t,  N = |z_t| |delta| = |z_t ^ z_{t-o}|
//   y_t = 1/n_t sum_o delta / max(N, eps)              g_t = W (z_t ^ y_t) + b
//
// The wedge of a chunk of tokens is written once, meets W in one product and is forgotten; the backward builds it
// again, so that nothing of size tokens x r(r-1)/2 outlives a chunk.
#include "linear.h"
#include "vec.h"

namespace grassland {
namespace {

// Tokens whose wedges are alive at once: 2 MB of float32 at r = 32.
constexpr int64_t kChunk = 1024;
constexpr int64_t kGrain = 64;

// The first `context` tokens of a text are there as partners alone: they have no row of the output.
struct Shape {
  int64_t tokens, length, rank, pairs, dim, context;

  int64_t own() const { return length - context; }
  int64_t rows() const { return length == 0 ? 0 : tokens / length * own(); }
  int64_t position(int64_t row) const { return context + row % own(); }
  int64_t token(int64_t row) const { return row / own() * length + position(row); }
};

int64_t whole_vectors(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// z in rows of `stride` numbers, filled up with zeros to whole vectors; the offsets filled up with ones that reach nowhere.
struct Wedge {
  const float* z;
  const std::vector<int64_t>& offsets;
  float eps;
  Shape shape;
  int64_t stride;
  std::vector<uint32_t> reach;

  Wedge(const float* z, const std::vector<int64_t>& offsets, float eps, const Shape& shape)
      : z(z), offsets(offsets), eps(eps), shape(shape), stride(whole_vectors(shape.rank)),
        reach(whole_vectors(offsets.size()), kNowhere) {
    for (size_t k = 0; k < offsets.size(); ++k) reach[k] = static_cast<uint32_t>(std::min<int64_t>(offsets[k], kNowhere));
  }

  const float* row(int64_t token) const { return z + token * stride; }
  int64_t position(int64_t token) const { return token % shape.length; }
  int64_t slots() const { return static_cast<int64_t>(reach.size()); }

 private:
  static constexpr uint32_t kNowhere = UINT32_MAX;
};

// Working memory for a token: rows and numbers of its pairs, filled up to whole vectors. The coordinates have a vector of
// slack before and behind them, since rows of the triangle begin and end anywhere.
struct Token {
  std::vector<float> z, y, dz, dy, coordinates, along_z, along_y;
  std::vector<float> ratio, scale, norm, rest, slope;
  float sums[kLanes * kLanes];

  explicit Token(const Wedge& w)
      : z(w.stride + kLanes), y(w.stride + kLanes), dz(w.stride), dy(w.stride),
        coordinates(w.shape.pairs + 2 * kLanes), along_z(w.stride * kLanes), along_y(w.stride * kLanes),
        ratio(w.slots()), scale(w.slots()), norm(w.slots()), rest(w.slots()), slope(w.slots()) {}

  float* triangle() { return coordinates.data() + kLanes; }
};

GRASSLAND_INLINE float square_norm(const float* row, int64_t stride) {
  Vec sum = {};
  for (int64_t c = 0; c < stride; c += kLanes) sum += load_full(row + c) * load_full(row + c);
  return total(sum);
}

// Lane k is the total of the vector that f(z_s, slot) returns for the partner of that slot, 0 where there is none.
template <typename F>
GRASSLAND_INLINE Vec for_partners(const Wedge& w, int64_t token, int64_t slot, float* sums, F&& f) {
  const int64_t t = w.position(token);
  for (int64_t k = 0; k < kLanes; ++k) {
    const int64_t offset = w.reach[slot + k];
    store_full(offset <= t ? f(w.row(token - offset), slot + k) : Vec{}, sums + k * kLanes);
  }
  return totals(sums);
}

// y_t, and how each pair came about: delta = z_s - ratio z_t, rest = |delta|^2, norm = N, and the weight
// scale = 1 / (n max(N, eps)) of delta in y_t; a missing partner has scale 0.
GRASSLAND_INLINE void average(const Wedge& w, int64_t token, Token& p) {
  const float* zt = w.row(token);
  const int64_t t = w.position(token);
  const float square = square_norm(zt, w.stride);
  float count = 0;
  for (const int64_t offset : w.offsets) count += offset <= t;
  for (int64_t slot = 0; slot < w.slots(); slot += kLanes) {
    const Vec inner = for_partners(w, token, slot, p.sums, [&](const float* zs, int64_t) GRASSLAND_INLINE_LAMBDA {
      Vec sum = {};
      for (int64_t c = 0; c < w.stride; c += kLanes) sum += load_full(zt + c) * load_full(zs + c);
      return sum;
    });
    store_full(square > 0 ? inner / square : Vec{}, p.ratio.data() + slot);
    const Vec rest = for_partners(w, token, slot, p.sums, [&](const float* zs, int64_t k) GRASSLAND_INLINE_LAMBDA {
      Vec sum = {};
      for (int64_t c = 0; c < w.stride; c += kLanes) {
        const Vec delta = load_full(zs + c) - p.ratio[k] * load_full(zt + c);
        sum += delta * delta;
      }
      return sum;
    });
    const Vec norm = std::sqrt(square) * square_root(rest), least = Vec{} + w.eps;
    VecBits reach;
    std::memcpy(&reach, w.reach.data() + slot, sizeof(reach));
    const VecBits there = (VecBits)(reach <= static_cast<uint32_t>(t));
    store_full(rest, p.rest.data() + slot);
    store_full(norm, p.norm.data() + slot);
    store_full(keep(1.0f / ((norm < least ? least : norm) * count), there), p.scale.data() + slot);
  }
  for (int64_t c = 0; c < w.stride; c += kLanes) {
    const Vec z = load_full(zt + c);
    Vec y = {};
    for (size_t k = 0; k < w.offsets.size(); ++k) {
      if (w.offsets[k] <= t) y += p.scale[k] * (load_full(w.row(token - w.offsets[k]) + c) - p.ratio[k] * z);
    }
    store_full(z, p.z.data() + c);
    store_full(y, p.y.data() + c);
  }
}

// Pairs (i, j), i < j, in lexicographic order; each row overwrites what the one before it wrote past its end.
template <typename T>
GRASSLAND_INLINE void wedge(Token& p, int64_t r, int64_t pairs, T* out) {
  float* row = p.triangle();
  for (int64_t i = 0; i + 1 < r; ++i) {
    const float zi = p.z[i], yi = p.y[i];
    for (int64_t j = i + 1; j < r; j += kLanes)
      store_full(zi * load_full(p.y.data() + j) - yi * load_full(p.z.data() + j), row + j - i - 1);
    row += r - 1 - i;
  }
  row = p.triangle();
#pragma omp simd
  for (int64_t k = 0; k < pairs; ++k) from_float(row[k], out[k]);
}

// V vectors of columns of the antisymmetric D, from column `begin` on; its upper triangle is in the coordinates. They give
// dz and dy their columns' part at once. What a row gives stays in along_y and along_z, a vector whose lanes are to be summed.
template <int V>
struct Columns {
  Token& p;
  int64_t r, begin;
  Vec z[V], y[V], dz[V], dy[V];

  // Row i from the vector `first` on, where the diagonal is if `diagonal`.
  template <int first, bool diagonal>
  GRASSLAND_INLINE_LAMBDA void row(int64_t i) {
    constexpr VecBits lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const float* grad = p.triangle() + i * r - i * (i + 1) / 2 + begin - i - 1;
    float *sum_y = p.along_y.data() + i * kLanes, *sum_z = p.along_z.data() + i * kLanes;
    const float zi = p.z[i], yi = p.y[i];
    Vec along_y = {}, along_z = {};
    if (!diagonal) {
      along_y = load_full(sum_y);
      along_z = load_full(sum_z);
    }
    for (int v = first; v < V; ++v) {
      Vec g = load_full(grad + v * kLanes);
      if (diagonal && v == first) g = keep(g, (VecBits)(lane > static_cast<uint32_t>(i - begin - v * kLanes)));
      along_y += g * y[v];
      along_z += g * z[v];
      dz[v] -= g * yi;
      dy[v] += g * zi;
    }
    store_full(along_y, sum_y);
    store_full(along_z, sum_z);
  }

  template <int first>
  GRASSLAND_INLINE_LAMBDA void diagonal() {
    const int64_t end = std::min(begin + (first + 1) * kLanes, r - 1);
    for (int64_t i = begin + first * kLanes; i < end; ++i) row<first, true>(i);
    if constexpr (first + 1 < V) diagonal<first + 1>();
  }

  GRASSLAND_INLINE_LAMBDA void run() {
    for (int v = 0; v < V; ++v) {
      z[v] = load_full(p.z.data() + begin + v * kLanes);
      y[v] = load_full(p.y.data() + begin + v * kLanes);
      dz[v] = dy[v] = Vec{};
    }
    for (int64_t i = 0; i < begin; ++i) row<0, false>(i);
    diagonal<0>();
    for (int v = 0; v < V; ++v) {
      store_full(dz[v], p.dz.data() + begin + v * kLanes);
      store_full(dy[v], p.dy.data() + begin + v * kLanes);
    }
  }
};

// dz = D y and dy = -D z for the antisymmetric D whose upper triangle is `grad`.
template <typename T>
GRASSLAND_INLINE void wedge_backward(Token& p, int64_t r, int64_t pairs, const T* grad) {
  float* upper = p.triangle();
#pragma omp simd
  for (int64_t k = 0; k < pairs; ++k) upper[k] = to_float(grad[k]);
  int64_t begin = 0;
  for (; r - begin > 3 * kLanes; begin += 4 * kLanes) Columns<4>{p, r, begin}.run();
  if (r - begin > 2 * kLanes)
    Columns<3>{p, r, begin}.run();
  else if (r - begin > kLanes)
    Columns<2>{p, r, begin}.run();
  else if (r > begin)
    Columns<1>{p, r, begin}.run();
  for (int64_t i = 0; i < r; i += kLanes) {
    store_full(load_full(p.dz.data() + i) + totals(p.along_y.data() + i * kLanes), p.dz.data() + i);
    store_full(load_full(p.dy.data() + i) - totals(p.along_z.data() + i * kLanes), p.dy.data() + i);
  }
}

// What a pair gives to its source: dz_s += scale dy_t + slope (z_s - ratio z_t).
struct Link {
  float ratio, scale, slope;
};

// The pairs of token t as targets. With h = dy_t / n, sigma = 1 / max(N, eps), kappa = -sigma^2 <h, delta> / N, which is 0
// where the norm is clamped:
//   dz_t += kappa (|delta|^2 z_t - <t,s> delta) - sigma c h        dz_s += sigma h + kappa |z_t|^2 delta
GRASSLAND_INLINE void targets_backward(const Wedge& w, int64_t token, Token& p, Link* links) {
  const float *zt = w.row(token), *dy = p.dy.data();
  const int64_t t = w.position(token);
  const float square = square_norm(zt, w.stride);
  Vec ahead = {}, back = {};
  for (int64_t slot = 0; slot < w.slots(); slot += kLanes) {
    const Vec along = for_partners(w, token, slot, p.sums, [&](const float* zs, int64_t k) GRASSLAND_INLINE_LAMBDA {
      Vec sum = {};
      for (int64_t c = 0; c < w.stride; c += kLanes)
        sum += load_full(dy + c) * (load_full(zs + c) - p.ratio[k] * load_full(zt + c));
      return sum;
    });
    const Vec scale = load_full(p.scale.data() + slot), norm = load_full(p.norm.data() + slot);
    const Vec kappa = keep(-scale * along / (norm * norm), (VecBits)(norm > Vec{} + w.eps));
    ahead += kappa * load_full(p.rest.data() + slot);
    back += scale * load_full(p.ratio.data() + slot);
    store_full(kappa * square, p.slope.data() + slot);
  }
  const float along_z = total(ahead), along_dy = total(back);
  for (int64_t c = 0; c < w.stride; c += kLanes) {
    const Vec z = load_full(zt + c);
    Vec sum = load_full(p.dz.data() + c) + along_z * z - along_dy * load_full(dy + c);
    for (size_t k = 0; k < w.offsets.size(); ++k) {
      if (w.offsets[k] > t) continue;
      const Vec delta = load_full(w.row(token - w.offsets[k]) + c) - p.ratio[k] * z;
      sum -= p.slope[k] * p.ratio[k] * delta;
    }
    store_full(sum, p.dz.data() + c);
  }
  for (size_t k = 0; k < w.offsets.size(); ++k) links[k] = {p.ratio[k], p.scale[k], p.slope[k]};
}

// dz of a token and what flows into it as the source of later ones, gathered in the order of the offsets.
GRASSLAND_INLINE void sources_backward(const Wedge& w, int64_t token, const float* dy, const Link* links, const float* dz,
                                       float* out) {
  const int64_t t = w.position(token), many = static_cast<int64_t>(w.offsets.size());
  for_each_vector(w.shape.rank, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    const Vec zs = load_full(w.row(token) + c);
    Vec sum = load_full(dz + c);
    for (int64_t k = 0; k < many; ++k) {
      if (w.offsets[k] >= w.shape.length - t) continue;
      const int64_t target = token + w.offsets[k];
      const Link& link = links[target * many + k];
      const Vec delta = zs - link.ratio * load_full(w.row(target) + c);
      sum += link.scale * load_full(dy + target * w.stride + c) + link.slope * delta;
    }
    store(sum, out + c, live);
  });
}

template <typename T>
GRASSLAND_INLINE void wedge_rows_body(const Wedge& w, int64_t begin, int64_t end, int64_t base, T* out) {
  const Shape& s = w.shape;
  Token p(w);
  for (int64_t row = begin; row < end; ++row) {
    average(w, s.token(row), p);
    wedge(p, s.rank, s.pairs, out + (row - base) * s.pairs);
  }
}

GRASSLAND_MULTIARCH void wedge_rows(const Wedge& w, int64_t begin, int64_t end, int64_t base, float* out) {
  wedge_rows_body(w, begin, end, base, out);
}

GRASSLAND_MULTIARCH void wedge_rows(const Wedge& w, int64_t begin, int64_t end, int64_t base, bf16* out) {
  wedge_rows_body(w, begin, end, base, out);
}

// Gradients with respect to z (as far as the tokens' own pairs go) and y, in rows like those of z, and the links, tokens x
// offsets.
struct Gradients {
  float *dz, *dy;
  Link* links;
};

template <typename T>
GRASSLAND_INLINE void wedge_rows_backward_body(const Wedge& w, int64_t begin, int64_t end, int64_t base, const T* grad,
                                               T* wedges, const Gradients& out) {
  const Shape& s = w.shape;
  Token p(w);
  for (int64_t token = begin; token < end; ++token) {
    average(w, token, p);
    if (wedges != nullptr) wedge(p, s.rank, s.pairs, wedges + (token - base) * s.pairs);
    if (grad == nullptr) continue;
    wedge_backward(p, s.rank, s.pairs, grad + (token - base) * s.pairs);
    targets_backward(w, token, p, out.links + token * w.offsets.size());
    std::memcpy(out.dz + token * w.stride, p.dz.data(), w.stride * sizeof(float));
    std::memcpy(out.dy + token * w.stride, p.dy.data(), w.stride * sizeof(float));
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

GRASSLAND_MULTIARCH void source_rows_backward(const Wedge& w, int64_t begin, int64_t end, const Gradients& found,
                                              float* out) {
  for (int64_t token = begin; token < end; ++token) {
    const float* dz = found.dz + token * w.stride;
    sources_backward(w, token, found.dy, found.links, dz, out + token * w.shape.rank);
  }
}

Shape shape_of(const Tensor& z, const Tensor& weight, int64_t context = 0) {
  return {z.size(0) * z.size(1), z.size(1), z.size(2), weight.size(1), weight.size(0), context};
}

// z with rows filled up to whole vectors, itself where they are.
Tensor filled(const Tensor& z, const Shape& s) {
  const int64_t stride = whole_vectors(s.rank);
  if (stride == s.rank) return z;
  const Tensor out = empty(z, {s.tokens, stride}, ScalarType::Float);
  const float* from = data<float>(z);
  float* to = data<float>(out);
  torch::stable::parallel_for(0, s.tokens, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      std::memcpy(to + token * stride, from + token * s.rank, s.rank * sizeof(float));
      std::memset(to + token * stride + s.rank, 0, (stride - s.rank) * sizeof(float));
    }
  });
  return out;
}

// out = product, of rows from `base` on, with the bias where at least one offset is valid; elsewhere the wedge is zero and
// so is the output. No bias: null.
template <typename T>
void place(const Tensor& product, const T* bias, int64_t first_valid, int64_t base, const Shape& s, T* out) {
  const T* from = data<T>(product);
  torch::stable::parallel_for(0, product.size(0), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const T* in = from + k * s.dim;
      T* row = out + (base + k) * s.dim;
      if (bias == nullptr || s.position(base + k) < first_valid) {
        std::copy_n(in, s.dim, row);
        continue;
      }
      for (int64_t c = 0; c < s.dim; ++c) from_float(to_float(in[c]) + to_float(bias[c]), row[c]);
    }
  });
}

template <typename T>
Tensor forward(const Tensor& z, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::vector<int64_t>& offsets, float eps, int64_t context) {
  const Shape s = shape_of(z, weight, context);
  const Tensor rows_of_z = filled(z, s);
  const Wedge w(data<float>(rows_of_z), offsets, eps, s);
  Tensor out = empty(z, {s.rows(), s.dim}, kDtype<T>);
  const T* added = bias ? data<T>(*bias) : nullptr;
  const int64_t first_valid = *std::min_element(offsets.begin(), offsets.end());
  const int64_t chunk = std::min(kChunk, s.rows());
  const Tensor wedges = empty(z, {chunk, s.pairs}, kDtype<T>);
  for (int64_t base = 0; base < s.rows(); base += chunk) {
    const int64_t stop = std::min(base + chunk, s.rows());
    torch::stable::parallel_for(base, stop, kGrain, [&](int64_t begin, int64_t end) {
      wedge_rows(w, begin, end, base, data<T>(wedges));
    });
    place(linear(rows(wedges, 0, stop - base), weight), added, first_valid, base, s, data<T>(out));
  }
  return torch::stable::view(out, {z.size(0), s.own(), s.dim});
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
  const Tensor rows_of_z = filled(z, s);
  const Wedge w(data<float>(rows_of_z), offsets, eps, s);
  const Tensor flat = torch::stable::view(grad, {s.tokens, s.dim});
  Tensor dz = empty(z, {need_z ? s.tokens : 0, s.rank}, ScalarType::Float);
  const Tensor own = w.stride == s.rank ? dz : empty(z, {need_z ? s.tokens : 0, w.stride}, ScalarType::Float);
  const Tensor dy = empty(z, {need_z ? s.tokens : 0, w.stride}, ScalarType::Float);
  std::vector<Link> links(need_z ? s.tokens * offsets.size() : 0);
  const Gradients found{data<float>(own), data<float>(dy), links.data()};
  OuterSum dweight(need_weight ? s.dim : 0, s.pairs);
  const int64_t chunk = std::min(kChunk, s.tokens);
  const Tensor wedges = empty(z, {need_weight ? chunk : 0, s.pairs}, kDtype<T>);
  for (int64_t base = 0; base < s.tokens && (need_z || need_weight); base += chunk) {
    const int64_t stop = std::min(base + chunk, s.tokens);
    const Tensor g = rows(flat, base, stop);
    std::optional<Tensor> dwedges;
    if (need_z) dwedges = linear(g, flipped(weight));
    torch::stable::parallel_for(base, stop, kGrain, [&](int64_t begin, int64_t end) {
      wedge_rows_backward(w, begin, end, base, need_z ? data<T>(*dwedges) : nullptr,
                          need_weight ? data<T>(wedges) : nullptr, found);
    });
    if (need_weight) dweight.add(g, rows(wedges, 0, stop - base));
  }
  if (need_z) {
    torch::stable::parallel_for(0, s.tokens, kGrain, [&](int64_t begin, int64_t end) {
      source_rows_backward(w, begin, end, found, data<float>(dz));
    });
  }
  const int64_t first_valid = *std::min_element(offsets.begin(), offsets.end());
  Tensor dbias = need_bias ? bias_gradient<T>(flat, first_valid, s) : zeros(z, {0}, ScalarType::Float);
  if (need_z) dz = torch::stable::view(dz, {z.size(0), z.size(1), s.rank});
  return {dz, dweight.result(z), dbias};
}

Tensor plucker_mix_cpu(const Tensor& z, const Tensor& weight, std::optional<Tensor> bias, std::vector<int64_t> offsets,
                       double eps, int64_t context) {
  return weight.scalar_type() == ScalarType::BFloat16
             ? forward<bf16>(z, weight, bias, offsets, static_cast<float>(eps), context)
             : forward<float>(z, weight, bias, offsets, static_cast<float>(eps), context);
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
  m.def("plucker_mix(Tensor z, Tensor weight, Tensor? bias, int[] offsets, float eps, int context) -> Tensor");
  m.def(
      "plucker_mix_backward(Tensor grad, Tensor z, Tensor weight, int[] offsets, float eps, bool need_z, "
      "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(grassland_cpp, CPU, m) {
  m.impl("plucker_mix", TORCH_BOX(&grassland::plucker_mix_cpu));
  m.impl("plucker_mix_backward", TORCH_BOX(&grassland::plucker_mix_backward_cpu));
}
