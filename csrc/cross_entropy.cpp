// Cross entropy of a linear head on the CPU: l = x W^T, loss = log sum exp(l) - (1 - s) l_y - s mean(l), and in place
// l <- softmax(l) - (1 - s) onehot - s / V. A chunk of rows of logits stays in the cache between its products, and a row
// between its passes.
#include "wide.h"

#include <limits>
#include <type_traits>

namespace grassland {
namespace {

// Columns whose terms are added in float32; their sums are added in float64.
constexpr int64_t kBlock = 4096;

struct Softmax {
  int64_t vocab;
  const int64_t* target;
  float smoothing;
  int64_t ignore;
  bool grad;
};

GRASSLAND_INLINE float largest(const float* l, int64_t n) {
  float peak = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : peak)
  for (int64_t c = 0; c < n; ++c) peak = std::max(peak, l[c]);
  return peak;
}

// l <- exp(l - peak), and the sums of these and of l - peak
GRASSLAND_INLINE void exponentials(float* l, int64_t n, float peak, double& powers, double& along) {
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    float p = 0, a = 0;
#pragma omp simd reduction(+ : p, a)
    for (int64_t c = begin; c < end; ++c) {
      const float below = l[c] - peak;
      a += below;
      l[c] = exp_approx(below);
      p += l[c];
    }
    powers += p;
    along += a;
  }
}

// The row l of float32, whether it lies in memory as such or was widened; NaN logits give a NaN loss and NaN gradients.
GRASSLAND_INLINE double softmax_row(const Softmax& s, int64_t label, float* l) {
  const float peak = largest(l, s.vocab);
  const double hit = l[label] - peak;
  double powers = 0, along = 0;
  exponentials(l, s.vocab, peak, powers, along);
  if (s.grad) {
    const float scale = static_cast<float>(1 / powers);
    const float shift = s.smoothing / static_cast<float>(s.vocab);
    for (int64_t c = 0; c < s.vocab; ++c) l[c] = l[c] * scale - shift;
    l[label] -= 1 - s.smoothing;
  }
  // 0 times the mean would be NaN where a logit is -inf
  const double spread = s.smoothing > 0 ? s.smoothing * (along / s.vocab) : 0;
  return std::log(powers) - (1 - s.smoothing) * hit - spread;
}

// The row as float32, itself or widened into `room`, and back.
GRASSLAND_INLINE float* opened(float* l, int64_t, float*) { return l; }
GRASSLAND_INLINE float* opened(const bf16* l, int64_t n, float* room) {
  for (int64_t c = 0; c < n; ++c) room[c] = to_float(l[c]);
  return room;
}
GRASSLAND_INLINE void closed(const float*, int64_t, float*) {}
GRASSLAND_INLINE void closed(const float* room, int64_t n, bf16* l) {
  for (int64_t c = 0; c < n; ++c) from_float(room[c], l[c]);
}

// Rows `begin` to `end` of the batch, whose logits start at row `base`.
template <typename T>
GRASSLAND_INLINE void softmax_rows_of(const Softmax& s, int64_t base, int64_t begin, int64_t end, T* logits,
                                      double* losses) {
  std::vector<float> room(std::is_same_v<T, float> ? 0 : s.vocab);
  for (int64_t row = begin; row < end; ++row) {
    T* l = logits + (row - base) * s.vocab;
    if (s.target[row] == s.ignore) {
      losses[row] = 0;
      if (s.grad) std::memset(l, 0, s.vocab * sizeof(T));
      continue;
    }
    float* wide = opened(l, s.vocab, room.data());
    losses[row] = softmax_row(s, s.target[row], wide);
    if (s.grad) closed(wide, s.vocab, l);
  }
}

// Clones are no templates.
#define GRASSLAND_SOFTMAX(T)                                                                                   \
  GRASSLAND_MULTIARCH void softmax_rows(const Softmax& s, int64_t base, int64_t begin, int64_t end, T* logits, \
                                        double* losses) {                                                     \
    softmax_rows_of(s, base, begin, end, logits, losses);                                                     \
  }
GRASSLAND_SOFTMAX(float)
GRASSLAND_SOFTMAX(bf16)

template <typename T>
std::tuple<Tensor, Tensor, Tensor> loss(const Tensor& x, const Tensor& weight, const Tensor& target, double smoothing,
                                        int64_t ignore_index, bool need_x, bool need_weight) {
  Gradients gradients(x, weight, need_x, need_weight);
  const Softmax s{weight.size(0), data<int64_t>(target), static_cast<float>(smoothing), ignore_index,
                  gradients.needed()};
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 14) / s.vocab);
  std::vector<double> losses(x.size(0));
  each_chunk(x.size(0), s.vocab, [&](int64_t base, int64_t stop) {
    const Tensor logits = linear(rows(x, base, stop), weight);
    torch::stable::parallel_for(base, stop, grain, [&](int64_t begin, int64_t end) {
      softmax_rows(s, base, begin, end, data<T>(logits), losses.data());
    });
    gradients.add(base, stop, logits);
  });
  return {total_of(x, losses), gradients.dx(), gradients.dweight()};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_cpu(const Tensor& x, const Tensor& weight, const Tensor& target,
                                                            double smoothing, int64_t ignore_index, bool need_x,
                                                            bool need_weight) {
  const auto run = x.scalar_type() == ScalarType::BFloat16 ? loss<bf16> : loss<float>;
  return run(x, weight, target, smoothing, ignore_index, need_x, need_weight);
}

}  // namespace
}  // namespace grassland

// Inputs are checked and made contiguous by kernels/cross_entropy/op.py: x and weight float32 or bfloat16 alike, int64 classes
// in range or ignored. The loss is summed.
STABLE_TORCH_LIBRARY_FRAGMENT(grassland_cpp, m) {
  m.def(
      "linear_cross_entropy(Tensor x, Tensor weight, Tensor target, float smoothing, int ignore_index, bool need_x, "
      "bool need_weight) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(grassland_cpp, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&grassland::linear_cross_entropy_cpu));
}
