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

// The target of one row: a class, or probabilities, smoothed; share: what gradients are multiplied with.
struct Target {
  const int64_t* labels;
  const float* probabilities;
  float share, smoothing;
  int64_t ignore;
};

#define GRASSLAND_SOURCE "subspace_rows.h"
#include "units.h"

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
      GRASSLAND_BEST(normalise)(h, begin, end, data<T>(x), data<float>(hat), data<T>(rounded), data<float>(norms));
    });
  }

  // The gradient by x^ becomes that by x.
  void backward(const Tensor& d) const {
    torch::stable::parallel_for(0, d.size(0), 16, [&](int64_t begin, int64_t end) {
      GRASSLAND_BEST(normalise_backward)(h, begin, end, data<float>(hat), data<float>(norms), data<float>(d));
    });
  }

  // use(base, stop, z) with the projections of one chunk after the other.
  template <typename F>
  void project(const Tensor& weight, const F& use) const {
    each_chunk<T>(rounded, weight, use);
  }
};

template <typename T>
Tensor logits(const Tensor& x, const Tensor& weight, int64_t k, double scale) {
  const Unit<T> u(x, weight, k, scale);
  Tensor out = empty(x, {u.h.rows, u.h.classes}, ScalarType::Float);
  u.project(weight, [&](int64_t base, int64_t stop, const Tensor& z) {
    torch::stable::parallel_for(0, stop - base, 4, [&](int64_t begin, int64_t end) {
      GRASSLAND_BEST(logits_rows)(u.h, begin, end, data<T>(z), data<float>(out) + base * u.h.classes);
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
      GRASSLAND_BEST(logits_backward_rows)(u.h, begin, end, data<float>(grad) + base * u.h.classes, data<T>(z));
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
      GRASSLAND_BEST(loss_rows)(u.h, t, base, begin, end, gradients.needed(), data<T>(z), losses.data());
    });
    gradients.add(base, stop, z);
  });
  if (need_x) u.backward(gradients.dx());
  return {total_of(x, losses), gradients.dx(), gradients.dweight()};
}

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
