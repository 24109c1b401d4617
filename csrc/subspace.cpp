// Grassmann class head on the CPU (arXiv 2308.01547): z = x^ W^T, logit_i = scale |z_i|, softmax cross entropy.
//
// A chunk of rows is projected by one product; one pass over each row takes the group norms, the loss and
// z <- scale dl z / |z| in place; two products make the gradients. Nothing of size rows x K k outlives a chunk. The
// products are of the inputs' type, and all else is float32.
#include <type_traits>

#include "losses.h"

namespace grassland {
namespace {

constexpr float kEps = 1e-12f;

struct Head {
  int64_t rows, n, classes, k;
  float scale;
};

GRASSLAND_INLINE float dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// n numbers as float32: themselves, or widened into `room`.
GRASSLAND_INLINE float* widened(float* x, int64_t, float*) { return x; }

GRASSLAND_INLINE float* widened(bf16* x, int64_t n, float* room) {
  for (int64_t i = 0; i < n; ++i) room[i] = to_float(x[i]);
  return room;
}

GRASSLAND_INLINE void put_back(const float*, int64_t, float*) {}

GRASSLAND_INLINE void put_back(const float* room, int64_t n, bf16* x) {
  for (int64_t i = 0; i < n; ++i) from_float(room[i], x[i]);
}

// x^ = x / max(|x|, eps), as it is and as the products take it
template <typename T>
GRASSLAND_INLINE void normalise_of(const Head& h, int64_t begin, int64_t end, T* x, float* hat, T* rounded,
                                   float* norms) {
  std::vector<float> room(h.n);
  for (int64_t row = begin; row < end; ++row) {
    const float* in = widened(x + row * h.n, h.n, room.data());
    float* out = hat + row * h.n;
    norms[row] = std::sqrt(dot(in, in, h.n));
    const float inverse = 1.0f / std::max(norms[row], kEps);
    for (int64_t i = 0; i < h.n; ++i) out[i] = in[i] * inverse;
    put_back(out, h.n, rounded + row * h.n);
  }
}

// d <- (d - x^ <x^, d>) / |x|; a norm that is clamped is a constant
GRASSLAND_MULTIARCH void normalise_backward(const Head& h, int64_t begin, int64_t end, const float* hat,
                                            const float* norms, float* d) {
  for (int64_t row = begin; row < end; ++row) {
    const float* unit = hat + row * h.n;
    float* out = d + row * h.n;
    const float along = norms[row] > kEps ? dot(unit, out, h.n) : 0.0f;
    const float inverse = 1.0f / std::max(norms[row], kEps);
    for (int64_t i = 0; i < h.n; ++i) out[i] = (out[i] - along * unit[i]) * inverse;
  }
}

template <int K>
GRASSLAND_INLINE void group_norms_of(const float* z, int64_t classes, float* norms) {
  for (int64_t c = 0; c < classes; ++c) {
    float sum = 0;
    for (int j = 0; j < K; ++j) sum += z[c * K + j] * z[c * K + j];
    norms[c] = sum;
  }
}

// |z_i| of one row
GRASSLAND_INLINE void group_norms(const float* z, int64_t classes, int64_t k, float* norms) {
  switch (k) {
    case 1: group_norms_of<1>(z, classes, norms); break;
    case 2: group_norms_of<2>(z, classes, norms); break;
    case 4: group_norms_of<4>(z, classes, norms); break;
    case 8: group_norms_of<8>(z, classes, norms); break;
    default:
      for (int64_t c = 0; c < classes; ++c) norms[c] = dot(z + c * k, z + c * k, k);
  }
  for (int64_t c = 0; c < classes; ++c) norms[c] = std::sqrt(norms[c]);
}

template <int K>
GRASSLAND_INLINE void scale_groups_of(float* z, int64_t classes, const float* factors) {
  for (int64_t c = 0; c < classes; ++c)
    for (int j = 0; j < K; ++j) z[c * K + j] *= factors[c];
}

// z_i <- dl_i scale z_i / |z_i|, 0 where z_i = 0; dl is used up
GRASSLAND_INLINE void pull_back(const Head& h, float scale, float* z, const float* norms, float* dl) {
  for (int64_t c = 0; c < h.classes; ++c) dl[c] = norms[c] > 0 ? scale * dl[c] / norms[c] : 0.0f;
  switch (h.k) {
    case 1: scale_groups_of<1>(z, h.classes, dl); break;
    case 2: scale_groups_of<2>(z, h.classes, dl); break;
    case 4: scale_groups_of<4>(z, h.classes, dl); break;
    case 8: scale_groups_of<8>(z, h.classes, dl); break;
    default:
      for (int64_t c = 0; c < h.classes; ++c)
        for (int64_t j = 0; j < h.k; ++j) z[c * h.k + j] *= dl[c];
  }
}

template <typename T>
GRASSLAND_INLINE void logits_rows_of(const Head& h, int64_t begin, int64_t end, T* z, float* out) {
  const int64_t width = h.classes * h.k;
  std::vector<float> room(width);
  for (int64_t row = begin; row < end; ++row) {
    float* o = out + row * h.classes;
    group_norms(widened(z + row * width, width, room.data()), h.classes, h.k, o);
    for (int64_t c = 0; c < h.classes; ++c) o[c] *= h.scale;
  }
}

template <typename T>
GRASSLAND_INLINE void logits_backward_rows_of(const Head& h, int64_t begin, int64_t end, const float* grad, T* z) {
  const int64_t width = h.classes * h.k;
  std::vector<float> norms(h.classes), dl(h.classes), room(width);
  for (int64_t row = begin; row < end; ++row) {
    float* zr = widened(z + row * width, width, room.data());
    group_norms(zr, h.classes, h.k, norms.data());
    std::memcpy(dl.data(), grad + row * h.classes, h.classes * sizeof(float));
    pull_back(h, h.scale, zr, norms.data(), dl.data());
    put_back(zr, width, z + row * width);
  }
}

// The target of one row: a class, or probabilities, smoothed; share: what gradients are multiplied with.
struct Target {
  const int64_t* labels;
  const float* probabilities;
  float share, smoothing;
  int64_t ignore;
};

// The loss of one row with logits scale |z|; dl <- mass softmax - q, the target q smoothed. dl null: the loss alone.
GRASSLAND_INLINE double loss_row(const Head& h, const Target& t, int64_t row, const float* norms, float* p, bool grad) {
  const int64_t classes = h.classes;
  const float uniform = t.smoothing / static_cast<float>(classes);
  const float peak = largest(norms, classes);
  const auto below = [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    return h.scale * (load(norms + c, live) - peak);
  };
  const float* q = t.probabilities == nullptr ? nullptr : t.probabilities + row * classes;
  const Sums sums = q == nullptr ? exponentials<false>(classes, p, q, below) : exponentials<true>(classes, p, q, below);
  const double mass = q == nullptr ? 1 : sums.mass * (1 - t.smoothing) + t.smoothing;
  const double hit = q == nullptr ? h.scale * (norms[t.labels[row]] - peak) : sums.hit;
  if (grad) {
    const float factor = static_cast<float>(mass / sums.powers);
    if (q != nullptr) {
      for (int64_t c = 0; c < classes; ++c) p[c] = p[c] * factor - (1 - t.smoothing) * q[c] - uniform;
    } else {
      // p - 1 of a confident target, as minus the sum of the others, would lose nothing; 1e-8 of it is lost here
      for (int64_t c = 0; c < classes; ++c) p[c] = p[c] * factor - uniform;
      p[t.labels[row]] -= 1 - t.smoothing;
    }
  }
  return mass * std::log(sums.powers) - (1 - static_cast<double>(t.smoothing)) * hit -
         static_cast<double>(uniform) * sums.along;
}

template <typename T>
GRASSLAND_INLINE void loss_rows_of(const Head& h, const Target& t, int64_t base, int64_t begin, int64_t end, bool grad,
                                   T* z, double* losses) {
  const int64_t width = h.classes * h.k;
  std::vector<float> norms(h.classes), p(h.classes), room(width);
  for (int64_t row = begin; row < end; ++row) {
    T* stored = z + (row - base) * width;
    if (t.labels != nullptr && t.labels[row] == t.ignore) {
      losses[row] = 0;
      if (grad) std::memset(stored, 0, width * sizeof(T));
      continue;
    }
    float* zr = widened(stored, width, room.data());
    group_norms(zr, h.classes, h.k, norms.data());
    losses[row] = loss_row(h, t, row, norms.data(), p.data(), grad);
    if (!grad) continue;
    pull_back(h, h.scale * t.share, zr, norms.data(), p.data());
    put_back(zr, width, stored);
  }
}

// Clones are no templates.
#define GRASSLAND_ROWS(T)                                                                                            \
  GRASSLAND_MULTIARCH void normalise(const Head& h, int64_t begin, int64_t end, T* x, float* hat, T* rounded,       \
                                     float* norms) {                                                                \
    normalise_of(h, begin, end, x, hat, rounded, norms);                                                            \
  }                                                                                                                 \
  GRASSLAND_MULTIARCH void logits_rows(const Head& h, int64_t begin, int64_t end, T* z, float* out) {               \
    logits_rows_of(h, begin, end, z, out);                                                                          \
  }                                                                                                                 \
  GRASSLAND_MULTIARCH void logits_backward_rows(const Head& h, int64_t begin, int64_t end, const float* grad, T* z) { \
    logits_backward_rows_of(h, begin, end, grad, z);                                                                \
  }                                                                                                                 \
  GRASSLAND_MULTIARCH void loss_rows(const Head& h, const Target& t, int64_t base, int64_t begin, int64_t end,      \
                                     bool grad, T* z, double* losses) {                                             \
    loss_rows_of(h, t, base, begin, end, grad, z, losses);                                                          \
  }
GRASSLAND_ROWS(float)
GRASSLAND_ROWS(bf16)

// x^ with its norms, float32, and x^ as the products take it.
template <typename T>
struct Unit {
  Head h;
  Tensor hat, rounded, norms;

  Unit(const Tensor& x, const Tensor& weight, int64_t k, double scale)
      : h{x.size(0), x.size(1), weight.size(0) / k, k, static_cast<float>(scale)},
        hat(empty(x, {h.rows, h.n}, ScalarType::Float)),
        rounded(std::is_same_v<T, float> ? hat : empty(x, {h.rows, h.n}, kDtype<T>)),
        norms(empty(x, {h.rows}, ScalarType::Float)) {
    torch::stable::parallel_for(0, h.rows, 16, [&](int64_t begin, int64_t end) {
      normalise(h, begin, end, data<T>(x), data<float>(hat), data<T>(rounded), data<float>(norms));
    });
  }

  // The gradient by x^ becomes that by x.
  void backward(const Tensor& d) const {
    torch::stable::parallel_for(0, d.size(0), 16, [&](int64_t begin, int64_t end) {
      normalise_backward(h, begin, end, data<float>(hat), data<float>(norms), data<float>(d));
    });
  }

  // use(base, stop, z) with the projections of one chunk after the other.
  template <typename F>
  void project(const Tensor& weight, const F& use) const {
    each_chunk<T>(h.rows, weight, [&](int64_t base, int64_t stop) {
      use(base, stop, linear(rows(rounded, base, stop), weight));
    });
  }
};

template <typename T>
Tensor logits(const Tensor& x, const Tensor& weight, int64_t k, double scale) {
  const Unit<T> u(x, weight, k, scale);
  Tensor out = empty(x, {u.h.rows, u.h.classes}, ScalarType::Float);
  u.project(weight, [&](int64_t base, int64_t stop, const Tensor& z) {
    torch::stable::parallel_for(0, stop - base, 4, [&](int64_t begin, int64_t end) {
      logits_rows(u.h, begin, end, data<T>(z), data<float>(out) + base * u.h.classes);
    });
  });
  return out;
}

template <typename T>
std::tuple<Tensor, Tensor> logits_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, int64_t k,
                                           double scale, bool need_x, bool need_weight) {
  const Unit<T> u(x, weight, k, scale);
  Gradients gradients(u.rounded, weight, need_x, need_weight, ScalarType::Float, kDtype<T>);
  u.project(weight, [&](int64_t base, int64_t stop, const Tensor& z) {
    torch::stable::parallel_for(0, stop - base, 4, [&](int64_t begin, int64_t end) {
      logits_backward_rows(u.h, begin, end, data<float>(grad) + base * u.h.classes, data<T>(z));
    });
    gradients.add(base, stop, z);
  });
  if (need_x) u.backward(gradients.dx());
  return {gradients.dx(), gradients.dweight()};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& target,
                                                 double share, int64_t k, double scale, double smoothing,
                                                 int64_t ignore_index, bool need_x, bool need_weight) {
  const Unit<T> u(x, weight, k, scale);
  Gradients gradients(u.rounded, weight, need_x, need_weight, ScalarType::Float, kDtype<T>);
  const bool hard = target.scalar_type() == ScalarType::Long;
  const Target t{hard ? data<int64_t>(target) : nullptr, hard ? nullptr : data<float>(target),
                 static_cast<float>(share), static_cast<float>(smoothing), ignore_index};
  std::vector<double> losses(u.h.rows);
  u.project(weight, [&](int64_t base, int64_t stop, const Tensor& z) {
    torch::stable::parallel_for(base, stop, 4, [&](int64_t begin, int64_t end) {
      loss_rows(u.h, t, base, begin, end, gradients.needed(), data<T>(z), losses.data());
    });
    gradients.add(base, stop, z);
  });
  if (need_x) u.backward(gradients.dx());
  return {total_of(x, losses), gradients.dx(), gradients.dweight()};
}

bool is_half(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

Tensor subspace_logits_cpu(const Tensor& x, const Tensor& weight, int64_t k, double scale) {
  return is_half(x) ? logits<bf16>(x, weight, k, scale) : logits<float>(x, weight, k, scale);
}

std::tuple<Tensor, Tensor> subspace_logits_backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                        int64_t k, double scale, bool need_x, bool need_weight) {
  const auto run = is_half(x) ? logits_backward<bf16> : logits_backward<float>;
  return run(grad, x, weight, k, scale, need_x, need_weight);
}

std::tuple<Tensor, Tensor, Tensor> subspace_cross_entropy_cpu(const Tensor& x, const Tensor& weight,
                                                              const Tensor& target, double share, int64_t k,
                                                              double scale, double smoothing, int64_t ignore_index,
                                                              bool need_x, bool need_weight) {
  const auto run = is_half(x) ? cross_entropy<bf16> : cross_entropy<float>;
  return run(x, weight, target, share, k, scale, smoothing, ignore_index, need_x, need_weight);
}

}  // namespace
}  // namespace grassland

// Inputs are checked and made contiguous by kernels/subspace/op.py: x and weight float32 or bfloat16 alike, grad float32,
// targets int64 classes in range or float32. The loss and x's gradient are float32, the weight's is of its dtype;
// the loss's gradients are times `share`.
STABLE_TORCH_LIBRARY_FRAGMENT(grassland_cpp, m) {
  m.def("subspace_logits(Tensor x, Tensor weight, int k, float scale) -> Tensor");
  m.def(
      "subspace_logits_backward(Tensor grad, Tensor x, Tensor weight, int k, float scale, bool need_x, "
      "bool need_weight) -> (Tensor, Tensor)");
  m.def(
      "subspace_cross_entropy(Tensor x, Tensor weight, Tensor target, float share, int k, float scale, "
      "float smoothing, int ignore_index, bool need_x, bool need_weight) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(grassland_cpp, CPU, m) {
  m.impl("subspace_logits", TORCH_BOX(&grassland::subspace_logits_cpu));
  m.impl("subspace_logits_backward", TORCH_BOX(&grassland::subspace_logits_backward_cpu));
  m.impl("subspace_cross_entropy", TORCH_BOX(&grassland::subspace_cross_entropy_cpu));
}
