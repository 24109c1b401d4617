// Cross entropy of a linear head on the CPU: l = x W^T, loss = log sum exp(l) - (1 - s) l_y - s mean(l), and in place
// l <- softmax(l) - (1 - s) onehot - s / V. A chunk of logits lives for its three products, and a row stays in the cache
// between its passes.
#include "losses.h"

#include <type_traits>

namespace grassland {
namespace {

struct Softmax {
  int64_t vocab;
  const int64_t* target;
  float share, smoothing;
  int64_t ignore;
  bool grad;
};

// The loss of the row l, which becomes its gradient times s.share; NaN for a NaN logit, and the gradient, too. room: l itself, or room for
// as many float32.
template <typename T>
GRASSLAND_INLINE double softmax_row(const Softmax& s, int64_t label, T* l, float* room) {
  const float peak = largest(l, s.vocab);
  const double hit = to_float(l[label]) - peak;
  const Sums sums = exponentials<false>(s.vocab, room, nullptr, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
    return load(l + c, live) - peak;
  });
  if (s.grad) {
    const float scale = static_cast<float>(1 / sums.powers);
    const float shift = s.smoothing / static_cast<float>(s.vocab);
    const float drop = (room[label] * scale - shift - (1 - s.smoothing)) * s.share;
    for_each_vector(s.vocab, [&](int64_t c, auto live) GRASSLAND_INLINE_LAMBDA {
      store((load(room + c, live) * scale - shift) * s.share, l + c, live);
    });
    from_float(drop, l[label]);
  }
  // 0 times the mean would be NaN where a logit is -inf
  const double spread = s.smoothing > 0 ? s.smoothing * (sums.along / s.vocab) : 0;
  return std::log(sums.powers) - (1 - s.smoothing) * hit - spread;
}

GRASSLAND_INLINE float* room_of(float* l, std::vector<float>&) { return l; }
GRASSLAND_INLINE float* room_of(bf16*, std::vector<float>& room) { return room.data(); }

// Rows `begin` to `end` of the batch, whose logits start at row `base`.
template <typename T>
GRASSLAND_INLINE void softmax_rows_of(const Softmax& s, int64_t base, int64_t begin, int64_t end, T* logits,
                                      double* losses) {
  std::vector<float> room(std::is_same_v<T, float> ? 0 : s.vocab);
  for (int64_t row = begin; row < end; ++row) {
    T* l = logits + (row - base) * s.vocab;
    if (s.target[row] != s.ignore) {
      losses[row] = softmax_row(s, s.target[row], l, room_of(l, room));
    } else {
      losses[row] = 0;
      if (s.grad) std::memset(l, 0, s.vocab * sizeof(T));
    }
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
std::tuple<Tensor, Tensor, Tensor> loss(const Tensor& x, const Tensor& weight, const Tensor& target, double share,
                                        double smoothing, int64_t ignore_index, bool need_x, bool need_weight, bool wide) {
  Gradients gradients(x, weight, need_x, need_weight, kDtype<T>, wide ? ScalarType::Float : kDtype<T>);
  const Softmax s{weight.size(0), data<int64_t>(target), static_cast<float>(share), static_cast<float>(smoothing),
                  ignore_index, gradients.needed()};
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 14) / s.vocab);
  std::vector<double> losses(x.size(0));
  each_chunk<T>(x.size(0), weight, [&](int64_t base, int64_t stop) {
    const Tensor logits = linear(rows(x, base, stop), weight);
    torch::stable::parallel_for(base, stop, grain, [&](int64_t begin, int64_t end) {
      softmax_rows(s, base, begin, end, data<T>(logits), losses.data());
    });
    gradients.add(base, stop, logits);
  });
  return {total_of(x, losses), gradients.dx(), gradients.dweight()};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_cpu(const Tensor& x, const Tensor& weight, const Tensor& target,
                                                            double share, double smoothing, int64_t ignore_index,
                                                            bool need_x, bool need_weight, bool wide) {
  const auto run = x.scalar_type() == ScalarType::BFloat16 ? loss<bf16> : loss<float>;
  return run(x, weight, target, share, smoothing, ignore_index, need_x, need_weight, wide);
}

}  // namespace
}  // namespace grassland

// Inputs are checked and made contiguous by kernels/cross_entropy/op.py: x and weight float32 or bfloat16 alike, int64
// classes in range or ignored. The loss is summed, float32; the gradients are times `share` and of the inputs' dtype,
// that of the weight float32 if `wide`.
STABLE_TORCH_LIBRARY_FRAGMENT(grassland_cpp, m) {
  m.def(
      "linear_cross_entropy(Tensor x, Tensor weight, Tensor target, float share, float smoothing, int ignore_index, "
      "bool need_x, bool need_weight, bool wide) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(grassland_cpp, CPU, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&grassland::linear_cross_entropy_cpu));
}
