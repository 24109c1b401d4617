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

#define GRASSLAND_SOURCE "cross_entropy_rows.h"
#include "units.h"

template <typename T>
std::tuple<Tensor, Tensor, Tensor> loss(const Tensor& x, const Tensor& weight, const Tensor& target, double share,
                                        double smoothing, int64_t ignore_index, bool need_x, bool need_weight, bool wide) {
  Gradients gradients(x, weight, need_x, need_weight, kDtype<T>, wide ? ScalarType::Float : kDtype<T>);
  const Softmax s{weight.size(0), data<int64_t>(target), static_cast<float>(share), static_cast<float>(smoothing),
                  ignore_index, gradients.needed()};
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 14) / s.vocab);
  std::vector<double> losses(x.size(0));
  each_chunk<T>(x, weight, [&](int64_t base, int64_t stop, const Tensor& logits) {
    torch::stable::parallel_for(base, stop, grain, [&](int64_t begin, int64_t end) {
      GRASSLAND_BEST(softmax_rows)(s, base, begin, end, data<T>(logits), losses.data());
    });
    gradients.add(base, stop, logits);
  });
  return {total_of(x, losses), gradients.dx(), gradients.dweight()};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_cpu(const Tensor& x, const Tensor& weight, const Tensor& target,
                                                            double share, double smoothing, int64_t ignore_index,
                                                            bool need_x, bool need_weight, bool wide) {
  const auto run = is_half(x) ? loss<bf16> : loss<float>;
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
