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

// What a pair gives to its source: dz_s += scale dy_t + slope (z_s - ratio z_t).
struct Link {
  float ratio, scale, slope;
};

// Gradients with respect to z (as far as the tokens' own pairs go) and y, in rows like those of z, and the links, tokens x
// offsets.
struct Gradients {
  float *dz, *dy;
  Link* links;
};

#define GRASSLAND_SOURCE "plucker_rows.h"
#include "units.h"

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
      GRASSLAND_BEST(wedge_rows)(w, begin, end, base, data<T>(wedges));
    });
    place(linear(rows(wedges, 0, stop - base), weight), added, first_valid, base, s, data<T>(out));
  }
  return torch::stable::view(out, {z.size(0), s.own(), s.dim});
}

template <typename T>
Tensor bias_gradient(const Tensor& grad, int64_t first_valid, const Shape& s) {
  Tensor total = zeros(grad, {s.dim}, ScalarType::Float);
  torch::stable::parallel_for(0, s.dim, kGrain, [&](int64_t begin, int64_t end) {
    GRASSLAND_BEST(sum_rows)(data<T>(grad), first_valid, s, begin, end, data<float>(total));
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
      GRASSLAND_BEST(wedge_rows_backward)(w, begin, end, base, need_z ? data<T>(*dwedges) : nullptr,
                                          need_weight ? data<T>(wedges) : nullptr, found);
    });
    if (need_weight) dweight.add(g, rows(wedges, 0, stop - base));
  }
  if (need_z) {
    torch::stable::parallel_for(0, s.tokens, kGrain, [&](int64_t begin, int64_t end) {
      GRASSLAND_BEST(source_rows_backward)(w, begin, end, found, data<float>(dz));
    });
  }
  const int64_t first_valid = *std::min_element(offsets.begin(), offsets.end());
  Tensor dbias = need_bias ? bias_gradient<T>(flat, first_valid, s) : zeros(z, {0}, ScalarType::Float);
  if (need_z) dz = torch::stable::view(dz, {z.size(0), z.size(1), s.rank});
  return {dz, dweight.result(z), dbias};
}

Tensor plucker_mix_cpu(const Tensor& z, const Tensor& weight, std::optional<Tensor> bias, std::vector<int64_t> offsets,
                       double eps, int64_t context) {
  return is_half(weight)
             ? forward<bf16>(z, weight, bias, offsets, static_cast<float>(eps), context)
             : forward<float>(z, weight, bias, offsets, static_cast<float>(eps), context);
}

std::tuple<Tensor, Tensor, Tensor> plucker_mix_backward_cpu(const Tensor& grad, const Tensor& z, const Tensor& weight,
                                                            std::vector<int64_t> offsets, double eps, bool need_z,
                                                            bool need_weight, bool need_bias) {
  return is_half(weight)
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
